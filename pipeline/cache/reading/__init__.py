"""Open a cache, read its rows, and verify them."""
