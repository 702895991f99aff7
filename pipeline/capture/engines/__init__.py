"""Engines that distribute shards: this process, local worker processes, or Ray."""
