"""Opening malicious caches.

Each one is refused with a one-line error, in bounded memory, without running code or touching
files outside the cache.
"""

from __future__ import annotations

import json
import shutil

import pytest

from tests.support.hostile import CACHES
from tests.support.processes import ROOT, python
from tests.support.rows import build_cache


@pytest.fixture(scope="module")
def opened(tmp_path_factory, lm_tokenizer):
    """The results of opening every hostile cache in one monitored process."""
    folder = tmp_path_factory.mktemp("h") / "hostile-caches"
    outside = folder.parent / "outside"
    outside.mkdir()
    build_cache(folder / "good", lm_tokenizer)
    for name, change in CACHES.items():
        shutil.copytree(folder / "good", folder / name)
        change(folder / name)
    before = {str(path): path.stat().st_mtime_ns for path in outside.rglob("*")}
    done = python("-m", "tests.support.hostile", str(folder), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    after = {str(path): path.stat().st_mtime_ns for path in outside.rglob("*")}
    return {**json.loads(done.stdout.splitlines()[-1]), "untouched": before == after}


def test_there_are_enough_of_them():
    assert len(CACHES) >= 30


@pytest.mark.parametrize("name", sorted(CACHES))
def test_a_hostile_cache_is_refused_in_one_line(opened, name):
    said = opened["caches"][name]["said"]
    assert not said.startswith("NOT"), said
    assert f"/{name}" in said
    assert opened["caches"][name]["seconds"] < 50 * opened["caches"]["good"]["seconds"]


def test_the_good_one_is_not(opened):
    assert opened["caches"]["good"]["said"] == "NOT REFUSED"


def test_nothing_was_touched_or_run_and_memory_is_bounded(opened):
    assert opened["untouched"]
    assert opened["seen"] == []
    assert opened["above_start_mb"] < 500, {k: v for k, v in opened["caches"].items() if v["grown_mb"] > 20}
