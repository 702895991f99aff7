"""Look at a data set and write the YAML file that distils a student from it: `softlabel init`."""

from pipeline.starter.run import run

__all__ = ["run"]
