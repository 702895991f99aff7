"""Every capture engine writes the same bytes, even when workers die."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner
from datasets import Dataset

from pipeline.cache import Layout, verify
from pipeline.cache.format.manifest import load_receipt
from pipeline.cache.storage.urls import open_filesystem
from pipeline.capture.engines import on_ray
from pipeline.capture.engines.deal import Deal
from pipeline.capture.run import run
from pipeline.cli import main
from pipeline.errors import CacheError, MisuseError, PipelineError, ServerError
from pipeline.generation.run import run as generate
from pipeline.records import ShardPlan
from pipeline.servers.answers import RefusedKeyError
from tests.support.captures import config, hashes  # noqa: F401 - a fixture
from tests.support.classifier import even, swapped
from tests.support.generations import config as writing  # noqa: F401 - a fixture
from tests.support.processes import ROOT, forked, python  # noqa: F401 - a fixture
from tests.support.s3 import bucket, s3_server  # noqa: F401 - fixtures


def test_processes_parts_and_this_process_make_the_same_bytes(config, tmp_path):
    """Workers are new interpreters here, as in normal use; the other tests fork them."""
    serial = run(config("serial"))
    assert len(serial.manifest.shards) == 9
    workers = run(config("workers", num_workers=2))
    assert run(config("parts", part="0/2")) is None
    assert not (tmp_path / "parts" / "manifest.json").exists()
    parts = run(config("parts", part="1/2"))
    assert hashes(workers) == hashes(serial) == hashes(parts)
    assert workers.manifest == serial.manifest == parts.manifest
    assert verify(parts.root).problems == ()
    assert run(config("parts", part="0/2")).manifest == serial.manifest  # already finished


@pytest.mark.full
def test_a_worker_that_dies_is_replaced(config, forked, tmp_path, monkeypatch):
    """The first process to begin its eighth batch is killed; a mark file spares the others."""
    monkeypatch.setenv("SOFTLABEL_TEST_MARK", str(tmp_path / "mark"))
    monkeypatch.setattr("pipeline.capture.engines.workers._work", _work_and_die)
    found = run(config("workers", num_workers=2))
    assert (tmp_path / "mark").exists()
    assert hashes(found) == hashes(run(config("serial")))


def _work_and_die(*args):
    from pipeline.capture import shard
    from pipeline.capture.engines import workers

    whole, seen = shard.forward, []

    def forward(job, *rest):
        seen.append(job)
        if len(seen) == 8:
            try:
                os.close(os.open(os.environ["SOFTLABEL_TEST_MARK"], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return whole(job, *rest)

    shard.forward = forward
    workers._work(*args)


def test_what_a_worker_meets_is_told_in_one_line(config, forked):
    with pytest.raises(PipelineError, match=r"no column 'texts'"):
        run(config("workers", num_workers=2, text_column="texts"))


@pytest.mark.parametrize("shards", [1, 7])
def test_a_worker_that_cannot_write_stops_the_capture(config, forked, monkeypatch, shards):
    """The worker fails in its only shard, and with more shards assigned to it."""
    monkeypatch.setattr("pipeline.capture.engines.workers._work", _work_on_a_full_disk)
    with pytest.raises(CacheError, match="the disk is full"):
        run(config("workers", num_workers=2, rows_per_shard=60 // shards, rows="0:40"))


def _work_on_a_full_disk(*args):
    from pipeline.capture import shard
    from pipeline.capture.engines import workers

    def record(*_):
        raise CacheError("the disk is full")

    shard.record = record
    workers._work(*args)


@pytest.mark.full
def test_workers_make_a_cache_behind_a_url_and_go_on_there(config, forked, bucket):
    """The cache at the URL includes the tokenizer; finished shards are not computed again."""
    serial = run(config("serial"))
    assert run(config(output=f"{bucket}/c", part="0/2")) is None
    before = outbox_times(f"{bucket}/c")
    made = run(config(output=f"{bucket}/c", num_workers=2))
    assert hashes(made) == hashes(serial)
    assert len(made.tokenizer) == len(serial.tokenizer)
    after = outbox_times(f"{bucket}/c")
    assert {name: after[name] for name in before} == before
    assert run(config(output=f"{bucket}/c", num_workers=2)).manifest == serial.manifest
    assert outbox_times(f"{bucket}/c") == after


def outbox_times(url: str) -> dict[str, object]:
    filesystem, root = open_filesystem(url)
    filesystem.invalidate_cache()
    return {item["name"]: item["LastModified"] for item in filesystem.ls(f"{root}/data", detail=True)}


def test_shards_of_a_dead_worker_go_to_another_and_the_third_death_stops():
    deal = Deal([ShardPlan(f"train-{i:05d}", "train", i, i + 1) for i in range(5)], workers=2)
    assert deal.to(0) == ["train-00000", "train-00001"]
    assert deal.to(0) == []
    assert deal.to(1) == ["train-00002", "train-00003"]
    deal.done(0, "train-00000")
    assert deal.to(0) == ["train-00004"]
    for _ in range(2):
        deal.lost(0, "exit code -9")
        assert deal.to(0) == ["train-00001", "train-00004"]
    assert not deal.is_over
    with pytest.raises(CacheError, match="3 workers have died at train-00001"):
        deal.lost(0, "exit code -9")


def test_more_gpus_than_there_are_is_a_line(config):
    with pytest.raises(MisuseError, match="expected 4 GPUs, found 0"):
        run(config("workers", num_workers=2, gpus_per_worker=2))


def test_a_killed_run_loses_one_shard_at_most(config, tmp_path):
    """A run killed while encoding the fourth shard keeps three shards, which are not recomputed."""
    settings = config("killed")
    code = f"""
import glob, os, signal
from pipeline.capture import shard
from pipeline.capture.run import run
from pipeline.cli import main
from pipeline.config import CacheLogitsConfig, DataConfig
whole = shard.label_rows
def label_rows(*args, **kwargs):
    if len(glob.glob({str(tmp_path / "killed" / "receipts" / "*.json")!r})) == 4:  # the plan and three receipts
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args, **kwargs)
shard.label_rows = label_rows
run(CacheLogitsConfig(task="causal-lm", data=DataConfig(dataset={settings.data.dataset!r}, max_length=64), teacher={settings.teacher!r},
    output={settings.output!r}, rows_per_shard=6, batch_tokens=256))
"""
    done = python("-c", code)
    assert done.returncode == -signal.SIGKILL
    layout = Layout(tmp_path / "killed")
    stamps = {p: p.stat().st_mtime_ns for p in layout.data.glob("[a-z]*.parquet")}
    assert len(stamps) == 3
    assert hashes(run(settings)) == hashes(run(config("serial")))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert load_receipt(layout, "train-00003") is not None


@pytest.fixture
def misnumbered(tmp_path, bert_tokenizer, save_teacher):
    """A function that runs `softlabel cache-logits` on rightly or wrongly numbered labels."""
    model, texts, classes = even(bert_tokenizer)
    teacher = save_teacher(model, bert_tokenizer)
    for name, labels in (("right", classes), ("wrong", swapped(classes))):
        Dataset.from_dict({"text": texts, "label": labels}).to_json(tmp_path / f"{name}.jsonl")

    def capture(data, *flags):
        settings = ["--teacher", str(teacher), "--dataset", str(tmp_path / f"{data}.jsonl"), "--rows-per-shard", "40"]
        command = ["cache-logits", "--task", "sequence-classification", *settings, "--output", str(tmp_path / "cache")]
        return CliRunner().invoke(main, [*command, *flags], catch_exceptions=False)

    return capture


def assert_refused(capture, root: Path, capfd, *flags: str) -> None:
    """Check that the capture fails with a one-line error and leaves existing files unchanged."""
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    done = capture("wrong", *flags)
    assert done.exit_code == 1
    *_, line = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "the data's classes are in another order than the teacher's" in line
    assert "add --label-map 0=film --label-map 1=sport" in line
    assert "Traceback" not in done.output + capfd.readouterr().err
    assert root.exists() == bool(before)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.full
def test_workers_refuse_classes_in_another_order(misnumbered, tmp_path, capfd):
    """The capture is refused in an empty directory, and before --overwrite deletes a cache."""
    root = tmp_path / "cache"
    assert_refused(misnumbered, root, capfd, "--num-workers", "2")
    assert misnumbered("right").exit_code == 0
    assert_refused(misnumbered, root, capfd, "--num-workers", "2", "--overwrite")


# ---------------------------------------------------------------------------------------------- Ray


@pytest.fixture(scope="module")
def cluster():
    """A local Ray cluster of two CPUs that imports this checkout."""
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}},
    )
    yield ray
    ray.shutdown()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_three_ray_workers_killed_in_mid_shard_change_nothing(config, cluster, tmp_path):
    serial = run(config("serial"))
    output = tmp_path / "ray"
    killed: list[tuple[int, set[str]]] = []

    def receipts() -> set[str]:
        return {path.stem for path in (output / "receipts").glob("[!.]*.json")} - {"plan"}

    def kill() -> None:
        """Kill a worker each time a shard has been finished, so that it dies in the next one."""
        while len(killed) < 3 and not over.is_set():
            workers = [
                p for p in psutil.process_iter(["cmdline"]) if "ShardWorker" in " ".join(p.info["cmdline"] or [])
            ]
            dead = {pid for pid, _ in killed}
            alive = [p for p in workers if p.pid not in dead]
            if alive and len(receipts()) > len(killed):
                alive[0].kill()
                killed.append((alive[0].pid, receipts()))
            time.sleep(0.02)

    over = threading.Event()
    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        found = run(config("ray", engine="ray", num_workers=2))
    finally:
        over.set()
        thread.join()
    assert len(killed) == 3
    assert all(len(made) < 9 for _, made in killed)  # each kill came before the end
    assert hashes(found) == hashes(serial)
    assert verify(found.root).problems == ()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_ray_writes_the_same_generated_data_set(writing, cluster):
    serial = generate(writing("serial"))
    found = generate(writing("ray", engine="ray", num_workers=2))
    assert found.end == serial.end
    assert [path.read_bytes() for path in sorted(found.root.glob("data/*"))] == [
        path.read_bytes() for path in sorted(serial.root.glob("data/*"))
    ]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_key_that_a_ray_worker_lacks_is_said_to_be_the_clusters():
    class TaskError(Exception):
        cause = RefusedKeyError("http://gpu:8000: refuses the key (401); set SOFTLABEL_SERVER_KEY in the environment")

    def get(reference):
        raise TaskError

    ray = SimpleNamespace(get=get, exceptions=SimpleNamespace(RayTaskError=TaskError))
    with pytest.raises(ServerError, match="in the environment of the Ray cluster, on every machine, before it starts"):
        on_ray._answer(ray, None)


@pytest.mark.full
def test_ray_tells_what_a_worker_met_and_refuses_what_cannot_start(config, cluster):
    with pytest.raises(PipelineError, match=r"no column 'texts'"):
        run(config("ray", engine="ray", text_column="texts"))
    with pytest.raises(MisuseError, match="3 workers of 0 GPUs and at least 1 CPU each, found 0 GPUs and 2 CPUs"):
        run(config("ray", engine="ray", num_workers=3))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_ray_refuses_classes_in_another_order(misnumbered, cluster, tmp_path, capfd):
    assert misnumbered("right").exit_code == 0
    assert_refused(misnumbered, tmp_path / "cache", capfd, "--engine", "ray", "--num-workers", "2", "--overwrite")
