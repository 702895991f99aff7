"""`softlabel init`: inspect a data set and write a YAML file to distil a student from it."""

from pipeline.starter.run import run

__all__ = ["run"]
