"""The engine that distributes shards among local processes, each with its own model."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from tqdm import tqdm

from pipeline.cache.writing.build import missing
from pipeline.cache.writing.claims import Claims
from pipeline.capture.engines.deal import Deal
from pipeline.capture.engines.progress import Tally, Throttle, already, progress_of, shards_of
from pipeline.capture.engines.work import AnyJob, Config, Work
from pipeline.errors import CacheError, MisuseError, PipelineError
from pipeline.models.quiet import quiet_libraries
from pipeline.records import Receipt, ShardPlan
from pipeline.verbosity import level_name, set_level

logger = logging.getLogger(__name__)

_SPAWN = multiprocessing.get_context("spawn")
_SECONDS_TO_STOP = 10


@dataclass(slots=True)
class _Worker:
    number: int
    process: BaseProcess
    connection: Connection


def run_workers(work: Work, config: Config, count: int) -> Any:
    """Distribute the shards (of a part) among `count` processes, and finish the output.

    The first process makes the plan; the others start after that.

    Raises:
        PipelineError: the error of a worker. The other workers are stopped; finished shards are
            kept.
    """
    layout = work.open_layout(config)
    devices = devices_of_workers(config, count)
    threads = max(1, torch.get_num_threads() // count)
    workers = [_start(work, 0, config, devices, threads)]
    config = work.after_the_first(config)
    try:
        _expect_ready(workers[0])
        plan = work.current_plan(layout)
        assert plan is not None  # the first worker has written it
        waiting = work.outstanding(layout, plan, config.parsed_part)
        if not waiting and work.is_finished(layout, plan):
            return already(work, layout)
        workers += [_start(work, number, config, devices, threads) for number in range(1, min(count, len(waiting)))]
        deal = Deal(waiting, len(workers))
        idle: dict[int, _Worker] = {}
        _give(deal, workers[0], idle)
        with progress_of(work, plan, waiting, config.parsed_part) as progress:
            tally = Tally(progress, {shard.name: shard.stop - shard.start for shard in waiting})
            while not deal.is_over:
                for worker in _next_to_speak(workers):
                    message = _receive(worker)
                    if message is None:
                        how = f"exit code {worker.process.exitcode}"
                        logger.warning("worker %d has died (%s); its shards go to another", worker.number, how)
                        deal.lost(worker.number, how)
                        tally.lost(worker.number)
                        workers[worker.number] = _start(work, worker.number, config, devices, threads)
                        for other in list(idle.values()):
                            _give(deal, other, idle)
                        continue
                    if message.error is not None:
                        raise message.error
                    if message.tokens:
                        tally.moved(worker.number, message.rows, message.tokens)
                    if message.made is not None:
                        deal.done(worker.number, message.made)
                        tally.made(worker.number, message.made)
                    if message.made is not None or not message.tokens:
                        _give(deal, worker, idle)
    finally:
        _stop(workers)
    return work.finish(layout, plan)


@dataclass(frozen=True, slots=True)
class _Message:
    """A message of a worker: it is ready, has run batches, has made a shard, or has an error."""

    made: str | None = None
    error: PipelineError | None = None
    rows: int = 0
    tokens: int = 0
    """Since the previous message."""


def _work(work: Work, config: Config, connection: Connection, threads: int, is_first: bool, level: str) -> None:
    """Run a worker process; it ends with its parent, even in the middle of a shard."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The progress bars of the libraries would share a lock between processes, and Python would
    # report its semaphore as leaked when the worker is stopped.
    tqdm.set_lock(threading.RLock())
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    set_level("warning" if level == "info" else level)  # avoid repeated messages
    quiet_libraries()
    torch.set_num_threads(threads)
    try:
        job = work.prepare(config)
        if is_first:
            for name in work.speaks if level == "info" else ():
                logging.getLogger(name).setLevel(logging.INFO)
            absent = set(missing(job.layout, job.plan))
            waiting = [shard for shard in shards_of(job.plan, config.parsed_part) if shard.name in absent]
            work.show(job, waiting)
            work.check_rows(job, waiting)
        work.check(job)
        connection.send(_Message())
        claims = Claims(job.layout, job.plan)

        def done(receipt: Receipt) -> None:
            claims.release(receipt.plan.name)
            rows, tokens = throttle.drain()
            connection.send(_Message(made=receipt.plan.name, rows=rows, tokens=tokens))

        def moved(rows: int, tokens: int) -> None:
            if throttle.add(rows, tokens):
                rows, tokens = throttle.drain()
                connection.send(_Message(rows=rows, tokens=tokens))

        throttle = Throttle()
        work.make(job, _given(job, connection, claims), done, moved)
    except PipelineError as error:
        connection.send(_Message(error=error))
    except BaseException:
        traceback.print_exc()
    os._exit(1)  # reached after an error only; the shard reader blocks a normal exit


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _given(job: AnyJob, connection: Connection, claims: Claims) -> Iterator[ShardPlan]:
    """Yield the shards that the parent assigns.

    A claim marks the output as being written. The shard is made even if another process holds its
    claim.
    """
    shards = {shard.name: shard for shard in job.plan.shards}
    while True:
        try:
            name = connection.recv()
        except EOFError:
            os._exit(1)
        claims.hold(name)
        yield shards[name]


def _start(work: Work, number: int, config: Config, devices: list[str], threads: int) -> _Worker:
    ours, theirs = _SPAWN.Pipe()
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number]  # inherited by the process
        if "," in devices[number] and config.device_map is None:
            config = dataclasses.replace(config, device_map="auto")
    try:
        process = _SPAWN.Process(
            target=_work,
            args=(work, config, theirs, threads, number == 0, level_name()),
            name=f"softlabel-{number}",
            daemon=True,
        )
        process.start()
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif devices:
            del os.environ["CUDA_VISIBLE_DEVICES"]
    theirs.close()
    return _Worker(number, process, ours)


def check_engine(config: Config) -> None:
    """Check that the requested workers are available, before anything is loaded.

    Raises:
        MisuseError: Ray is not installed, or there are too few GPUs.
    """
    if config.engine == "ray":
        if importlib.util.find_spec("ray") is None:
            raise MisuseError("--engine ray needs Ray; pip install 'soft-label-pipeline[ray]'")
    elif config.num_workers is not None:
        devices_of_workers(config, config.num_workers)


def devices_of_workers(config: Config, count: int) -> list[str]:
    """Return the CUDA_VISIBLE_DEVICES of each worker; empty if workers use no GPU.

    Raises:
        MisuseError: fewer GPUs than requested.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = (
        [d for d in visible.split(",") if d]
        if visible is not None
        else list(map(str, range(torch.cuda.device_count())))
    )
    each = config.gpus_per_worker or (1 if config.uses_devices and found and torch.cuda.is_available() else 0)
    if each * count > len(found):
        raise MisuseError(
            f"--num-workers {count} with --gpus-per-worker {each}: expected {count * each} GPUs, found {len(found)}"
        )
    return [",".join(found[i * each : (i + 1) * each]) for i in range(count)] if each else []


def _expect_ready(worker: _Worker) -> None:
    message = _receive(worker)
    if message is None:
        raise CacheError(f"the first worker has died at the start (exit code {worker.process.exitcode})")
    if message.error is not None:
        raise message.error


def _give(deal: Deal, worker: _Worker, idle: dict[int, _Worker]) -> None:
    for name in deal.to(worker.number):
        with contextlib.suppress(OSError):  # it has died; its closed connection is handled next
            worker.connection.send(name)
    if deal.in_hand(worker.number):
        idle.pop(worker.number, None)
    else:
        idle[worker.number] = worker


def _next_to_speak(workers: list[_Worker]) -> list[_Worker]:
    """Wait for workers with a message or a closed connection."""
    ready: list[Any] = wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in ready]


def _receive(worker: _Worker) -> _Message | None:
    """Return the next message, or None if the worker has died."""
    try:
        message = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        return None
    assert isinstance(message, _Message)
    return message


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
        worker.process.terminate()
    for worker in workers:
        worker.process.join(_SECONDS_TO_STOP)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
