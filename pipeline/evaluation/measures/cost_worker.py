"""Measure one model in its own process: one JSON line in, one out.

Run as `python -m pipeline.evaluation.measures.cost_worker`, so that the measured memory is that of
one model. The worker loads the model, prepares its batches, answers with `Ready`, and then runs one
turn for each request; the caller can let several models take turns. Tokenization is not timed,
since batches are prepared before.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Order:
    """The first line of input: the model to load and the rows to run on."""

    cache: str
    model: str
    split: str
    rows: int
    """Number of rows of the split to run on."""
    batch_rows: int
    threads: int | None
    own_tokens: bool = False
    """Whether the model's tokenizer differs from the cache's."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The first answer: the model is loaded and the batches are prepared."""

    num_parameters: int
    device: str
    threads: int
    tokens: float
    """Mean number of tokens of the rows."""
    num_rows: int
    text_bytes: int
    """Bytes of text that the supervised positions of the rows predict."""
    before_bytes: int | None
    """Resident memory before loading; None if it is not known."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The answer to `{"batched": bool}`: one turn."""

    seconds: tuple[float, ...]
    """Duration of each forward pass."""
    rows: int
    """Total number of rows of the turn."""
    cpu_seconds: float
    joules: float | None
    """Energy of the whole machine by its meter; None: the meter cannot be read."""
    peak_bytes: int | None
    """Peak resident memory so far, or peak GPU memory on a GPU."""


def main() -> None:
    """Serve one model until the end of standard input."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    with contextlib.redirect_stdout(sys.stderr):  # keep prints of libraries out of the answers
        order = Order(**json.loads(sys.stdin.readline()))
        serve(order, answers)


def serve(order: Order, answers: Any) -> None:
    """Load the model and answer with `Ready`, then run one turn for each line of input."""
    import numpy as np
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    from pipeline.cache import Cache
    from pipeline.cache.format.codec import text_bytes_of
    from pipeline.cache.format.rows import gather
    from pipeline.evaluation.passes import collator_of
    from pipeline.tasks import get_task
    from pipeline.training.student import load_student

    cache = Cache.open(order.cache, verify="none")
    task = get_task(cache.manifest.contract.task)
    _forget_peak()
    before, loading = _memory("VmRSS"), None
    if order.own_tokens:
        loaded, cache, before, loading = _with_own_tokens(cache, order, before)
    else:
        loaded = load_student(cache.manifest.contract, order.model, new_head=False)
    model = loaded.model
    if model.device.type == "cuda":
        before = 0
    dataset = cache.dataset(order.split)
    num_rows = min(order.rows, len(dataset))
    rows = gather(dataset.segments(np.arange(num_rows)))
    collate = collator_of(cache, task, loaded).collate_block

    def batches(size: int) -> list[Any]:
        return [collate(gather([(rows, i, min(i + size, num_rows))])) for i in range(0, num_rows, size)]

    kinds = {False: batches(1), True: batches(order.batch_rows)}
    _say(
        answers,
        Ready(
            num_parameters=sum(p.numel() for p in model.parameters()),
            device=str(model.device),
            threads=torch.get_num_threads(),
            tokens=len(rows.lists["input_ids"].values) / num_rows if "input_ids" in rows.lists else 1.0,
            num_rows=num_rows,
            text_bytes=int(text_bytes_of(rows).sum()),
            before_bytes=before,
        ),
    )
    for line in sys.stdin:
        chosen = kinds[json.loads(line)["batched"]]
        seconds = []
        energy, processor = _meter(), time.process_time()
        for batch in chosen:
            inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
            supervised = None if batch.supervised is None else batch.supervised.to(model.device)
            started = time.perf_counter()
            with torch.inference_mode():
                task.gather_logits(model, inputs, supervised)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else _most(_memory("VmHWM"), loading)
        turn = Turn(tuple(seconds), num_rows, time.process_time() - processor, _spent(energy, _meter()), peak)
        _say(answers, turn)


def _with_own_tokens(cache: Any, order: Order, before: int | None) -> tuple[Any, Any, int | None, int | None]:
    """Load a model with another tokenizer than the cache's, and the cache in its tokens.

    The memory of the alignment is not counted as the model's.

    Args:
        before: resident memory before loading, in bytes.

    Returns:
        Model; cache; `before` plus the memory of the alignment; the peak of loading on the same
        basis.
    """
    import gc

    from pipeline.cross_tokenizer.opening import cache_for
    from pipeline.models import load_model
    from pipeline.tasks import get_task
    from pipeline.training.student import check_fit

    task = get_task(cache.manifest.contract.task)
    loaded = load_model(task, order.model, dtype="float32", trainable=True)
    loading, held = _memory("VmHWM"), _memory("VmRSS")
    view = cache_for(cache, order.model, order.split, teaches=False)
    check_fit(task, view.manifest.contract, loaded)
    gc.collect()
    grown = (_memory("VmRSS") or 0) - (held or 0)
    _forget_peak()
    return loaded, view, None if before is None else before + grown, None if loading is None else loading + grown


def _most(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _say(answers: Any, answer: Ready | Turn) -> None:
    answers.write(json.dumps(asdict(answer)) + "\n")
    answers.flush()


def _memory(field: str) -> int | None:
    """A memory field of this process in bytes; unlike `ru_maxrss` without the parent's peak."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _forget_peak() -> None:
    """Reset the peak memory, which importing libraries raised, if the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _meter() -> dict[str, tuple[int, int]]:
    """Package -> (microjoules, maximum before wrap-around) from RAPL; empty if unreadable."""
    found = {}
    for package in sorted(Path("/sys/class/powercap").glob("intel-rapl:*")):
        if package.name.count(":") == 1:  # a whole package, not a part of one
            try:
                energy, limit = (int((package / name).read_text()) for name in ("energy_uj", "max_energy_range_uj"))
            except (OSError, ValueError):
                return {}
            found[package.name] = (energy, limit)
    return found


def _spent(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> float | None:
    """Joules between two readings of the meter."""
    if not before or before.keys() != after.keys():
        return None
    return sum((after[name][0] - start) % (limit + 1) for name, (start, limit) in before.items()) / 1e6


if __name__ == "__main__":
    main()
