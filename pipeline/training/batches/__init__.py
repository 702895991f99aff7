"""Batches of training rows from caches: order, mixture, collation and prefetching."""
