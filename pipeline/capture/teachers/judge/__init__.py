"""A language model as the teacher of a classifier: the probability of a label is that of its text after a prompt."""
