"""Sweeps: train many students from one or more caches, and rank them on a leaderboard."""

from pipeline.sweep.leaderboard import SweepReport, format_leaderboard
from pipeline.sweep.run import report, run

__all__ = ["SweepReport", "format_leaderboard", "report", "run"]
