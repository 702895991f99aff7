"""Many students from one cache: the grid, its runs, the leaderboard."""

from pipeline.sweep.leaderboard import SweepReport, format_leaderboard
from pipeline.sweep.run import report, run

__all__ = ["SweepReport", "format_leaderboard", "report", "run"]
