"""The settings of a student's training: those given by flags, and defaults for the others."""
