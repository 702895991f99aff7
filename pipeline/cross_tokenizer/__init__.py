"""A cache read in the tokens of a student with another tokenizer: bytes of tokens, aligned rows, mapped targets."""
