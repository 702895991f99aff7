"""Estimate of the cost and the errors of each encoding, from a pilot."""
