"""The progress of on-policy distillation: a teacher's loss on what the student wrote, round by round."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.cache import Cache
from pipeline.cache.format.manifest import parse
from pipeline.config import CacheLogitsConfig, GenerateConfig, Step, TrainStudentConfig
from pipeline.errors import CacheError
from pipeline.generation.records import NAMES, GenerationEnd

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Written:
    """A teacher's view of what a model wrote."""

    tokens: int
    """Written, and labelled by the teacher."""
    teacher_nll: float
    """The teacher's negative log-likelihood, mean over the tokens, nats."""
    reverse_kl: float | None
    """KL(writer || teacher), nats a token: the mean of log p(writer) - log p(teacher) over the tokens,
    an unbiased estimate. None: the tokens were not drawn from the writer's own distribution, or not
    all of them are in the cache."""


def measure_written(cache: Cache | str | Path, written: str | Path) -> Written:
    """How a teacher sees what a model wrote, from the cache of it alone.

    Args:
        cache: labels of the generated data set, read by token ids: the completions alone are supervised.
        written: directory of the generated data set.

    Raises:
        CacheError: one of the two is not finished, or the cache has no position.
    """
    opened = cache if isinstance(cache, Cache) else Cache.open(cache, verify="none")
    end_file = Path(written) / NAMES.end
    if not end_file.is_file():
        raise CacheError(f"{written}: no finished generated data set here ({NAMES.end} is missing)")
    tokens = sum(shard.positions for shard in opened.manifest.shards)
    if not tokens:
        raise CacheError(f"{opened.where}: expected soft labels of what was written, found no position")
    sums = [opened.dataset(split).column("teacher_nll_sum") for split in opened.splits]
    nll = float(np.concatenate(sums).astype(np.float64).sum())
    logprob = _logprob(Path(written), parse(GenerationEnd, end_file), tokens)
    return Written(tokens, nll / tokens, None if logprob is None else (logprob + nll) / tokens)


def _logprob(root: Path, end: GenerationEnd, tokens: int) -> float | None:
    """Sum over all completions, nats.

    None: they are not draws from the model's own distribution, or not as many tokens as are labelled.
    """
    sampling = end.contract.sampling
    filters = (sampling.top_p, sampling.top_k, sampling.min_p)
    if sampling.temperature != 1 or any(value is not None for value in filters) or end.contract.dropped:
        return None
    columns = ["completion_tokens", "logprob"]
    tables = [pq.read_table(root / "data" / f"{shard.name}.parquet", columns=columns) for shard in end.shards]
    if any(table["logprob"].null_count for table in tables):
        return None
    counted = sum(int(np.asarray(table["completion_tokens"]).sum()) for table in tables)
    return sum(float(np.asarray(table["logprob"]).sum()) for table in tables) if counted == tokens else None


def written_caches(steps: Sequence[tuple[Step, Any]]) -> Mapping[str, tuple[int, str]]:
    """Caches of what a student wrote.

    Returns:
        Directory of the cache -> its round, and the directory of the generated data set.
    """
    outputs = {
        (step.round, os.path.normpath(config.output)): config.output
        for step, config in steps
        if isinstance(config, GenerateConfig)
    }
    found: dict[str, tuple[int, str]] = {}
    for step, config in steps:
        if isinstance(config, CacheLogitsConfig) and step.round is not None:
            written = outputs.get((step.round, os.path.normpath(config.data.dataset)))
            if written is not None:
                found[os.path.normpath(config.output)] = (step.round, written)
    return found


def progress(cache: str, number: int, written: str, told: dict[int, Written]) -> str | None:
    """One line on a round; None: its cache is not finished, or behind a URL.

    Args:
        told: earlier rounds; this one is added.
    """
    if not (Path(cache) / "manifest.json").is_file():
        return None
    found = told[number] = measure_written(cache, written)
    before = told.get(number - 1)
    nll = f" (round {number - 1}: {before.teacher_nll:.3f})" if before is not None else ""
    line = f"round {number}: the teacher's loss on what the student wrote is {found.teacher_nll:.3f} nats a token{nll}"
    if found.reverse_kl is not None:
        line += f"; KL(student || teacher) {found.reverse_kl:.3f}"
        if before is not None and before.reverse_kl is not None:
            line += f" ({before.reverse_kl:.3f})"
    return f"{line}; {found.tokens:,} tokens"


def warn_of_own_labels(steps: Sequence[tuple[Step, Any]]) -> None:
    """Warn where a student would learn, as hard labels, the tokens that it wrote itself."""
    written = written_caches(steps)
    for _, config in steps:
        if not isinstance(config, TrainStudentConfig) or config.hard_labels == "teacher":
            continue
        own = [cache for cache in config.cache if os.path.normpath(cache) in written]
        if own and (config.hard_weight is None or config.hard_weight > 0):
            said = "is not given" if config.hard_weight is None else f"is {config.hard_weight:g}"
            logger.warning(
                "train-student %s: hard_weight %s: the hard labels of %s are the tokens that a student wrote; with hard_weight: 0 it "
                "learns from the teacher alone",
                config.output,
                said,
                own[0],
            )
            return
