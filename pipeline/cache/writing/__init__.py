"""Write a cache: claim its shards, write them, and commit the cache."""
