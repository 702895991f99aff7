"""What each encoding would cost and lose, from a pilot."""
