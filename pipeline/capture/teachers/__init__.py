"""Teachers (a local model, a server) that turn tokenized rows into soft labels and scores."""
