"""From the rows of a cache to batches: order, mixture, collation, prefetching."""
