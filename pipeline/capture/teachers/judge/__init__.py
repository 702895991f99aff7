"""A language model as the teacher of a classifier: it scores label texts after a prompt."""
