"""Who makes which shard: this process, local workers, or Ray."""
