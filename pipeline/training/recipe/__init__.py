"""How a student is trained: what flags say, and what is chosen where they say nothing."""
