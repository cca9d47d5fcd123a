"""Where and when the flows run: what `prefect.yaml` needs that is code, and how to deploy."""
