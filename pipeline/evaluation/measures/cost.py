"""Measure what models cost to run, and when a cache pays off."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from pipeline.cache import Cache, Layout
from pipeline.cache.format.manifest import parse
from pipeline.errors import ModelError, PipelineError
from pipeline.evaluation.measures.cost_worker import Order, Ready, Turn
from pipeline.evaluation.records import BreakEven, Cost, Machine, Provenance, Spread
from pipeline.progress import track
from pipeline.records import Receipt

#: Number of rows that are timed one by one in each round.
LATENCY_ROWS = 32

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to measure."""

    name: str
    directory: str
    cache: str
    """The cache whose rows it runs on."""
    num_parameters: int
    own_tokens: bool = False
    """Whether its tokenizer differs from the cache's."""


def measure_costs(
    candidates: Sequence[Candidate],
    split: str,
    *,
    rounds: int,
    batch_rows: int,
    threads: int | None,
    watts: float,
    in_bytes: bool = False,
) -> tuple[tuple[Cost, ...], Machine | None]:
    """Measure each model in its own process.

    Every model has a turn in each round, in changing order, so that noise of the machine affects
    all models alike. The first round is a warm-up and is not counted. The others are compared with
    the candidate named `teacher`.

    Args:
        rounds: number of counted rounds; 0: report sizes only.
        batch_rows: rows per batch for the throughput.
        threads: CPU threads of each model; None: the default of PyTorch.
        watts: power of one busy core, used if no energy meter can be read.
        in_bytes: whether models have different tokenizers; bytes of text are then counted too.
    """
    if not rounds or not candidates:
        return tuple(Cost(item.name, item.num_parameters, disk_bytes(item.directory)) for item in candidates), None
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(
                _Worker(
                    item, Order(item.cache, item.directory, split, LATENCY_ROWS, batch_rows, threads, item.own_tokens)
                )
            )
            for item in candidates
        ]
        ready = [worker.ready() for worker in workers]
        turns: dict[tuple[int, bool], list[Turn]] = {}
        for number in track(range(rounds + 1), "costs", rounds + 1, unit="round"):
            order = [(number + i) % len(workers) for i in range(len(workers))]
            for i in order:
                for kind in (False, True):
                    turn = workers[i].turn(batched=kind)
                    if number:
                        turns.setdefault((i, kind), []).append(turn)
    metered = all(turn.joules is not None for many in turns.values() for turn in many)
    base = next((i for i, item in enumerate(candidates) if item.name == "teacher"), None)
    costs = []
    for i, item in enumerate(candidates):
        single, batched = turns[i, False], turns[i, True]
        costs.append(
            Cost(
                name=item.name,
                num_parameters=ready[i].num_parameters,
                disk_bytes=disk_bytes(item.directory),
                latency=spread([second for turn in single for second in turn.seconds]),
                throughput=spread([turn.rows / sum(turn.seconds) for turn in batched]),
                speedup=None if base is None else _speedup(turns[base, False], single),
                speedup_batched=None if base is None else _speedup(turns[base, True], batched),
                peak_bytes=_above(ready[i].before_bytes, max((t.peak_bytes or 0) for t in (*single, *batched))),
                joules_per_thousand=_joules(batched, watts, metered=metered),
                bytes_per_second=spread([ready[i].text_bytes / sum(t.seconds) for t in batched]) if in_bytes else None,
            )
        )
    energy = (
        "read from the processor's meter (RAPL) around the batched passes; it counts everything that runs on the machine"
        if metered
        else f"an estimate, not a measurement: processor seconds of the batched passes x {watts:g} W for each busy core; the machine has no meter that can be read"
    )
    machine = Machine(
        device=ready[0].device,
        threads=ready[0].threads,
        rounds=rounds,
        batch_rows=min(batch_rows, ready[0].num_rows),
        tokens=round(ready[0].tokens),
        energy=energy,
        bytes_per_row=round(ready[0].text_bytes / ready[0].num_rows) if in_bytes else None,
    )
    return tuple(costs), machine


class _Worker:
    """The process of one model."""

    def __init__(self, candidate: Candidate, order: Order) -> None:
        self.candidate = candidate
        self.order = order

    def __enter__(self) -> _Worker:
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        here = str(Path(__file__).parents[3])  # the worker runs this copy of the code
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.evaluation.measures.cost_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            },
        )
        self._send(asdict(self.order))
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.said.close()

    def ready(self) -> Ready:
        return TypeAdapter(Ready).validate_json(self._line())

    def turn(self, *, batched: bool) -> Turn:
        self._send({"batched": batched})
        return TypeAdapter(Turn).validate_json(self._line())

    def _send(self, message: Mapping[str, object]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended; `_line` raises the reason
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.said.seek(0)
            lines = [text.strip() for text in self.said if text.strip()]
            last = lines[-1] if lines else "it was ended from outside"
            raise ModelError(
                f"{self.candidate.directory}: the process that measures {self.candidate.name} has ended: {last}; --rounds 0 measures no speed"
            )
        return line


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    low, middle, high = np.quantile(np.asarray(values), [0.25, 0.5, 0.75])
    return Spread(float(middle), float(low), float(high))


def _speedup(base: Sequence[Turn], ours: Sequence[Turn]) -> Spread:
    """Ratios per round, so that a slowdown in a round affects both models."""
    return spread([sum(a.seconds) / sum(b.seconds) for a, b in zip(base, ours, strict=True)])


def _above(before: int | None, after: int | None) -> int | None:
    return None if before is None or not after else max(0, after - before)


def _joules(turns: Sequence[Turn], watts: float, *, metered: bool) -> float:
    rows = sum(turn.rows for turn in turns)
    if metered:
        return 1000 * sum(turn.joules or 0.0 for turn in turns) / rows
    return 1000 * watts * sum(turn.cpu_seconds for turn in turns) / rows


def disk_bytes(directory: str) -> int | None:
    """Bytes of the files of weights in a model directory; None for a hub name."""
    path = Path(directory)
    if path.is_file():
        return path.stat().st_size
    files = [
        file for pattern in _WEIGHTS for file in path.glob(pattern) if file.name != "training_args.bin"
    ]  # not files of weights
    return sum(file.stat().st_size for file in files) if files else None


def break_even(name: str, cache: Cache, runs: Sequence[Provenance], split: str = "train") -> BreakEven | None:
    """After how many epochs, summed over students, a cache costs less than a teacher in the loop.

    A teacher in the loop would run over the split in every epoch of every student. The time to
    decode the cache and the memory of a teacher in the loop are not counted.

    Args:
        runs: runs of the students; those trained without the teacher (hard labels only) are
            ignored.

    Returns:
        None if the receipts do not record the teacher's time, as in imported caches.
    """
    layout = Layout(cache.root)
    receipts = [receipt for shard in cache.manifest.split_shards(split) if (receipt := _receipt(layout, shard.name))]
    forward = sum(receipt.forward_seconds for receipt in receipts)
    if len(receipts) < len(cache.manifest.split_shards(split)) or forward <= 0:
        return None
    whole = sum(receipt.seconds for receipt in receipts)
    taught = [run for run in runs if run.cache_id == cache.manifest.cache_id and _uses_teacher(run)]
    made = [run.passes for run in taught if run.passes is not None]
    passes = sum(made) if made and len(made) == len(taught) else None
    return BreakEven(
        cache=name,
        cache_bytes=sum(shard.bytes for shard in cache.manifest.split_shards(split)),
        capture_seconds=whole,
        pass_seconds=forward,
        device=", ".join(dict.fromkeys(receipt.device for receipt in receipts)),
        passes=whole / forward,
        passes_made=passes,
        saved_seconds=None if passes is None else passes * forward - whole,
    )


def _receipt(layout: Layout, name: str) -> Receipt | None:
    try:
        return parse(Receipt, layout.receipt(name))
    except (OSError, PipelineError):
        return None


def _uses_teacher(run: Provenance) -> bool:
    if run.loss is None:
        return False
    loss = run.loss
    return bool(loss.soft_weight or loss.soft_weight_end or loss.span_weight or run.teacher_labels)


def training_entries(run: Provenance, *names: str) -> Iterator[tuple[float, tuple[float, ...]]]:
    """Yield step and values of each log entry that has all of the given names."""
    for entry in run.history:
        if all(name in entry for name in names):
            yield entry["step"], tuple(entry[name] for name in names)
