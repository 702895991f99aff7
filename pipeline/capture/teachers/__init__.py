"""Teachers: what turns tokenised rows into soft labels and scores. A local model is one, a server another."""
