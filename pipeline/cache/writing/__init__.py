"""Write the shards of a cache, claim them, and commit the whole."""
