"""A small run of `make test-faults`, in a separate process because it forks."""

from __future__ import annotations

import pytest

from tests.support.processes import ROOT, python


@pytest.mark.full
def test_kills_flips_cuts_and_races(tmp_path):
    """One kill at each named point, 40 bit flips, 10 truncations and 3 + 3 races.

    The output marks each undetected fault as MISSED.
    """
    done = python("-m", "benchmarks.faults", "--small", env={"TMPDIR": str(tmp_path)}, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MISSED" not in done.stdout
    assert int(done.stdout.split("SIGKILL", 1)[1].splitlines()[0].split()[-2]) >= 8  # kill points
    assert "two plans at once" in done.stdout
