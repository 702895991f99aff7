"""Teachers turn tokenised rows into soft labels and scores: a local model, a server."""
