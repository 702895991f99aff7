"""The faults of `make test-faults`, in small: a process of its own, which forks."""

from __future__ import annotations

from tests.support.processes import ROOT, python


def test_kills_flips_cuts_and_races(tmp_path):
    """One kill at each named point, 40 flips, 10 cuts, 3 + 3 races.

    The table names what was missed.
    """
    done = python("-m", "benchmarks.faults", "--small", env={"TMPDIR": str(tmp_path)}, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MISSED" not in done.stdout
    assert int(done.stdout.split("SIGKILL", 1)[1].splitlines()[0].split()[-2]) >= 8  # points
    assert "two plans at once" in done.stdout
