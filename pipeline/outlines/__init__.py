"""The `--dry-run` of commands that load a model: what they would read and write."""
