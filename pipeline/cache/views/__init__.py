"""Reports about a finished cache: dataset card, HTML page, kept mass."""
