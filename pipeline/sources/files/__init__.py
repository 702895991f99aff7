"""Where data sets lie, and how their files become rows: local, behind a URL, on the hub."""
