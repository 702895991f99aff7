"""Caches for students with another tokenizer: token bytes, aligned rows, mapped targets."""
