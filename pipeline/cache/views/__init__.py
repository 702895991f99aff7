"""Reports about a finished cache: dataset card, page, kept mass."""
