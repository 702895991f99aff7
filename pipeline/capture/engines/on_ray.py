"""Ray as the engine of a capture or of generation: one actor per GPU, or per share of the CPUs.

Ray starts and restarts workers and transports their progress. It does not write the Parquet files,
because it stores tensors as an extension type. Receipts, not Ray's checkpoints, ensure that each
shard counts exactly once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.cache.writing.claims import Claims
from pipeline.capture.engines.deal import Deal
from pipeline.capture.engines.progress import Tally, Throttle, already, progress_of
from pipeline.capture.engines.work import Config, Work
from pipeline.errors import CacheError, MisuseError, PipelineError, ServerError
from pipeline.records import Receipt, ShardPlan
from pipeline.servers.answers import RefusedKeyError
from pipeline.verbosity import level_name, set_level

logger = logging.getLogger(__name__)

_SECONDS_TO_WARN = 30.0
_OBJECT_STORE_BYTES = 80 << 20  # only names of shards pass through


def run_on_ray(work: Work, config: Config) -> Any:
    """Distribute the shards among actors on a Ray cluster, and finish the output.

    The cluster is that of RAY_ADDRESS, or one that runs on this machine, or a new local one. Every
    machine needs this package, the model and the data set under the same names, and access to the
    output: a shared directory or a URL.

    Raises:
        PipelineError: the error of a worker. The other workers are stopped; finished shards are
            kept.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
    except ImportError:
        raise MisuseError("--engine ray needs Ray; pip install 'soft-label-pipeline[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        _connect(ray)
    try:
        return _run(ray, work, config)
    finally:
        if ours:
            ray.shutdown()


@dataclasses.dataclass(frozen=True, slots=True)
class _Share:
    """The number of workers, and the resources of each."""

    workers: int
    cpus: int
    gpus: int


def _run(ray: Any, work: Work, config: Config) -> Any:
    layout = work.open_layout(config)
    share = _share(ray, config)
    if share.gpus > 1 and config.device_map is None:
        config = dataclasses.replace(config, device_map="auto")
    actor_class = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus)(ShardWorker)
    actors = {0: actor_class.remote(work, config, os.getcwd(), share.cpus, level_name())}
    speaking = {actors[0].ready.remote(is_first=True): 0}
    try:
        _wait(ray, speaking, share)
        for reference in list(speaking):
            try:
                _answer(ray, reference)
            except ray.exceptions.RayActorError as error:
                raise CacheError(
                    f"the first worker has died at the start: {str(error).strip().splitlines()[0]}"
                ) from None
        config = work.after_the_first(config)
        plan = work.current_plan(layout)
        if plan is None:
            raise CacheError(
                f"{layout.name}: the plan of the first worker is missing, since it runs on another machine; use a directory that all machines share, or a URL"
            )
        waiting = work.outstanding(layout, plan, None)
        if not waiting and work.is_finished(layout, plan):
            return already(work, layout)
        for number in range(1, min(share.workers, len(waiting))):
            actors[number] = actor_class.remote(work, config, os.getcwd(), share.cpus, level_name())
            speaking[actors[number].ready.remote()] = number
        deal = Deal(waiting, len(actors))
        with progress_of(work, plan, waiting) as progress:
            tally = Tally(progress, {shard.name: shard.stop - shard.start for shard in waiting})
            while not deal.is_over:
                for reference in _wait(ray, speaking, share):
                    number = speaking.pop(reference)
                    try:
                        said = _answer(ray, reference)
                    except ray.exceptions.RayActorError as error:
                        how = str(error).strip().splitlines()[0]
                        logger.warning("worker %d has died; its shards go to another", number)
                        deal.lost(number, how)
                        tally.lost(number)
                        actors[number] = actor_class.remote(work, config, os.getcwd(), share.cpus, level_name())
                        speaking[actors[number].ready.remote()] = number
                        idle = actors.keys() - set(speaking.values())
                    else:
                        idle = {number}
                        if said is not None and said.tokens:
                            tally.moved(number, said.rows, said.tokens)
                        if said is not None and said.made is not None:
                            deal.done(number, said.made)
                            tally.made(number, said.made)
                    for worker in idle:
                        for name in deal.to(worker):
                            actors[worker].give.remote(name)
                        if deal.in_hand(worker):
                            speaking[actors[worker].says.remote()] = worker
    finally:
        for actor in actors.values():
            ray.kill(actor)
    return work.finish(layout, plan)


@dataclasses.dataclass(frozen=True, slots=True)
class _Said:
    """The progress of a worker since its last message."""

    rows: int
    tokens: int
    made: str | None = None
    """Name of a shard whose receipt is written."""


class ShardWorker:
    """Ray actor that makes the shards assigned to it, one after another."""

    def __init__(self, work: Work, config: Config, directory: str, threads: int, level: str) -> None:
        self._of, self._config, self._directory, self._threads, self._level = work, config, directory, threads, level
        self._given: queue.Queue[str] = queue.Queue()
        self._said: queue.Queue[_Said | BaseException] = queue.Queue()

    def ready(self, *, is_first: bool = False) -> None:
        """Load the model and join the work; the first worker also checks the rows of all shards.

        Relative paths refer to the working directory of the command.
        """
        import torch

        from pipeline.models.quiet import quiet_libraries

        if Path(self._directory).is_dir():
            os.chdir(self._directory)
        set_level(self._level)
        quiet_libraries()
        torch.set_num_threads(self._threads)
        job = self._of.prepare(self._config)
        if is_first:
            self._of.check_rows(job, self._of.outstanding(job.layout, job.plan, None))
        self._of.check(job)
        threading.Thread(target=self._work, args=(job,), daemon=True).start()

    def give(self, name: str) -> None:
        """Assign a shard to this worker."""
        self._given.put(name)

    def says(self) -> _Said:
        """Wait for the next progress message; raise the error of the work, if any."""
        found = self._said.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _work(self, job: Any) -> None:
        shards = {shard.name: shard for shard in job.plan.shards}
        claims = Claims(job.layout, job.plan)

        def given() -> Iterator[ShardPlan]:
            for name in iter(self._given.get, ""):
                # A claim marks the output as being written. The shard is made even if another
                # process holds its claim.
                claims.hold(name)
                yield shards[name]

        def done(receipt: Receipt) -> None:
            claims.release(receipt.plan.name)
            rows, tokens = throttle.drain()
            self._said.put(_Said(rows, tokens, made=receipt.plan.name))

        def moved(rows: int, tokens: int) -> None:
            if throttle.add(rows, tokens):
                self._said.put(_Said(*throttle.drain()))

        throttle = Throttle()
        try:
            self._of.make(job, given(), done, moved)
        except BaseException as error:
            self._said.put(error)


def _connect(ray: Any) -> None:
    """Connect to an existing cluster, or start a local one that ends with this process."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError as error:
        if os.environ.get("RAY_ADDRESS"):
            raise CacheError(f"RAY_ADDRESS: no cluster answers there: {str(error).splitlines()[0]}") from None
        ray.init(include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
    signal.signal(signal.SIGTERM, terminate)  # Ray replaces the handler


def _share(ray: Any, config: Config) -> _Share:
    """Return the number of workers, and the resources that each requests from the cluster.

    Raises:
        MisuseError: more workers are requested than the cluster can run.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("GPU", "CPU"))
    each = config.gpus_per_worker or (1 if gpus and config.uses_devices else 0)
    room = sum(int(node.get("GPU", 0)) // each for node in nodes) if each else cpus
    count = config.num_workers or (room if each else len(nodes))
    if count == 0 or count > room or count > cpus:
        raise MisuseError(
            f"--engine ray: {config.num_workers or 'each'} workers of {each} GPUs and at least 1 CPU each, found {gpus} GPUs and {cpus} CPUs in the cluster"
        )
    smallest = int(min(node.get("CPU", 0) for node in nodes if node.get("CPU", 0) >= 1))
    on_one = -(-count // len(nodes))
    return _Share(count, max(1, smallest // on_one), each)


def _wait(ray: Any, speaking: dict[Any, int], share: _Share) -> list[Any]:
    """Wait for the next messages; log a warning while the cluster has no free resources."""
    while True:
        ready, _ = ray.wait(list(speaking), num_returns=1, timeout=_SECONDS_TO_WARN)
        if ready:
            return list(ready)
        free = ray.available_resources()
        if free.get("CPU", 0) < share.cpus or free.get("GPU", 0) < share.gpus:
            logger.warning("waiting for free resources: each worker needs %d CPUs and %d GPUs", share.cpus, share.gpus)


def _answer(ray: Any, reference: Any) -> _Said | None:
    """Return a worker's message, or None if it reports that it is ready.

    Raises:
        PipelineError: the error of the worker.
    """
    try:
        found = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, RefusedKeyError):
            raise ServerError(
                f"{cause} of the Ray cluster, on every machine, before it starts: the key is not sent through Ray"
            ) from None
        if isinstance(cause, PipelineError):
            raise cause from None
        raise CacheError(
            f"a Ray worker failed: {str(error).strip().splitlines()[-1]}; finished shards are kept"
        ) from None
    assert found is None or isinstance(found, _Said)
    return found
