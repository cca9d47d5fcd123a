"""What things look like: configuration, tables, manifests. Imports nothing of ours and nothing heavy."""
