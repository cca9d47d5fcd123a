"""One thin Prefect task a step, and what the UI is shown of it. No mathematics."""
