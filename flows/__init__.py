"""The steps in order: the curriculum, one flow for each single step, and the command that runs them."""
