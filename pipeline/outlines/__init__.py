"""`--dry-run` of the commands whose work begins in a model: what they would read and write."""
