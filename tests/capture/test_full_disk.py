"""A disk that fills up during a capture.

The capture fails with a one-line error, keeps finished shards intact, and continues once there is
space.
"""

from __future__ import annotations

import errno
import logging
import shutil

import pytest

import pipeline as softlabel
from pipeline.cache import verify
from pipeline.cache.storage.crash import POINTS, hooked
from pipeline.errors import CacheError
from tests.conftest import tiny_model
from tests.support.processes import ROOT, python

#: Runs a capture in a separate process on a 4 MB tmpfs in a private mount namespace; another file
#: fills that disk after the first shard.
SCRIPT = """
import ctypes, os, sys
from pathlib import Path
folder = Path(sys.argv[1])
disk = folder / "disk"
disk.mkdir()
libc = ctypes.CDLL(None, use_errno=True)
private = 0x44000  # MS_REC | MS_PRIVATE
if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, private, None) or libc.mount(b"tmpfs", bytes(disk), b"tmpfs", 0, b"size=4m"):
    print("cannot mount")
    sys.exit(0)
from benchmarks.faults import make_bench, shared_files
from pipeline.cache.storage.crash import hooked
from pipeline.errors import PipelineError
bench, output, ballast = make_bench(folder / "bench"), disk / "cache", disk / "ballast"
def fill(point):
    if point == "receipt:named" and not ballast.exists():
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        ballast.write_bytes(bytes(free - 4096))
try:
    with hooked(fill):
        bench.capture(output)
except PipelineError as error:
    print(str(error).replace(chr(10), "<newline>"))
print(sorted(p.name for p in (output / "data").iterdir()))
for path in (output / "data").iterdir():
    assert path.read_bytes() == (bench.whole / "data" / path.name).read_bytes(), path
import shutil
shutil.copytree(output, folder / "elsewhere")
bench.capture(folder / "elsewhere")
ballast.unlink()
bench.capture(output)
print(shared_files(output) == shared_files(bench.whole) == shared_files(folder / "elsewhere"))
"""


def test_a_file_system_of_4_mb_fills_in_mid_shard(tmp_path):
    """The capture can be continued in place and from a copy in another directory."""
    done = python("-c", SCRIPT, str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    if found == ["cannot mount"]:
        pytest.skip("mounting is not permitted here")
    assert found[0].endswith(
        "train-00001.parquet: the disk is full; files written before are complete: free some space, then run the same command again"
    )
    assert found[1:] == ["['train-00000.parquet']", "True"]


@pytest.fixture
def settings(bert_tokenizer, topics):
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3)
    model.config.id2label = {0: "business", 1: "sport", 2: "film"}
    return {
        "teacher": model,
        "dataset": topics,
        "task": "sequence-classification",
        "tokenizer": bert_tokenizer,
        "rows_per_shard": 40,
    }


@pytest.mark.parametrize("point", [p for p in POINTS if p.endswith((":written", ":synced", ":row-group"))])
def test_every_write_may_find_the_disk_full(tmp_path, settings, point):
    def full(name: str) -> None:
        if name == point:
            raise OSError(errno.ENOSPC, "No space left on device")

    with hooked(full), pytest.raises(CacheError, match=r"the disk is full; .* run the same command again"):
        softlabel.cache_logits(output=tmp_path / "c", **settings)
    assert not (tmp_path / "c" / "manifest.json").exists()
    assert not list((tmp_path / "c").rglob(".tmp-*"))
    assert verify(softlabel.cache_logits(output=tmp_path / "c", **settings).root).problems == ()


@pytest.mark.parametrize(("free", "warned"), [(10_000, True), (1 << 40, False)])
def test_a_disk_that_is_too_small_is_told_before_the_first_shard(tmp_path, settings, monkeypatch, caplog, free, warned):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: type("Usage", (), {"free": free}))
    from pipeline.capture.engines import in_process

    shards = []
    whole = in_process.capture_shards
    monkeypatch.setattr(in_process, "capture_shards", lambda *args: shards.append(len(caplog.records)) or whole(*args))
    with caplog.at_level(logging.WARNING, "pipeline"):
        softlabel.cache_logits(output=tmp_path / "c", **settings)
    told = [record for record in caplog.records[: shards[0]] if "are free on this disk" in record.getMessage()]
    assert len(told) == warned


def test_the_estimate_is_about_right_and_then_from_what_is_there(tmp_path, settings, monkeypatch):
    """The estimate is within a factor of 2 of the columns' size; later it uses finished shards."""
    from pipeline.capture.engines import in_process

    found = []
    whole = in_process.warn_of_full_disk
    monkeypatch.setattr(in_process, "warn_of_full_disk", lambda job, waiting: found.append(whole(job, waiting)))
    cache = softlabel.cache_logits(output=tmp_path / "c", **settings)
    columns = sum(
        len(row.example.text) + 2 * row.example.num_tokens + 52
        for split in cache.splits
        for row in cache.dataset(split)
    )
    assert columns / 2 < found[0] < columns * 2
    shard = cache.manifest.shards[1]
    (cache.root / "data" / f"{shard.name}.parquet").unlink()
    softlabel.cache_logits(output=tmp_path / "c", **settings)
    assert found[1] == pytest.approx(shard.bytes, rel=0.5)
