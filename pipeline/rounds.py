"""Progress of on-policy distillation: the teacher's loss on the student's texts, per round."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.cache import Cache
from pipeline.cache.format.codec import hash_tokens
from pipeline.cache.format.manifest import parse
from pipeline.config import CacheLogitsConfig, GenerateConfig, TrainStudentConfig
from pipeline.errors import CacheError
from pipeline.generation.records import NAMES, GenerationEnd, ServedModel
from pipeline.steps import Resolved, place_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Written:
    """The teacher's loss on the texts that a model generated."""

    tokens: int
    """Number of tokens labelled by the teacher: completions, and prompts if they are supervised."""
    teacher_nll: float
    """The teacher's negative log-likelihood in nats, mean over `tokens`."""
    reverse_kl: float | None
    """KL(writer || teacher) in nats per token: the mean of log p(writer) - log p(teacher) over the
    tokens. The estimate is unbiased, except for the bias of a ratio over rows of different lengths.
    None: the tokens were not sampled from the writer's own distribution, or the cache does not
    cover exactly these tokens."""
    written_tokens: int
    """Number of tokens of all completions: more than `tokens` if the cache lost some, fewer if
    prompts are supervised too."""


def measure_written(cache: Cache | str | Path, written: str | Path) -> Written:
    """Measure the teacher's loss on generated texts from the cache alone.

    Args:
        cache: cache of the generated data set, read by token ids, so that only completions are
            supervised.
        written: directory of the generated data set.

    Raises:
        CacheError: cache or data set is not finished, or the cache has no position or rows that are
            not in the data set.
    """
    opened = cache if isinstance(cache, Cache) else Cache.open(cache, verify="none")
    root = Path(written)
    end_file = root / NAMES.end
    if not end_file.is_file():
        raise CacheError(f"{written}: no finished generated data set here ({NAMES.end} is missing)")
    tokens = sum(shard.positions for shard in opened.manifest.shards)
    if not tokens:
        raise CacheError(f"{opened.where}: expected soft labels of what was written, found no position")
    end = parse(GenerationEnd, end_file)
    counted, logprob = 0, 0.0
    own = _are_own_draws(end)
    written_rows, longest = Counter[int](), 0
    for shard in end.shards:
        table = pq.read_table(root / "data" / f"{shard.name}.parquet", columns=_COLUMNS)
        counted += int(np.asarray(table["completion_tokens"]).sum())
        own = own and not table["logprob"].null_count and "tokenizer" not in table["ids_from"].to_pylist()
        logprob += float(np.nansum(np.asarray(table["logprob"].to_pylist(), dtype=np.float64)))
        for ids in table["input_ids"]:
            row = np.asarray(ids.values, dtype=np.int32)
            written_rows[hash_tokens(row, None)] += 1
            longest = max(longest, len(row))
    labelled = Counter(
        np.concatenate([opened.dataset(split).column("content_hash") for split in opened.splits]).tolist()
    )
    _check_of_these(opened, str(written), labelled, written_rows, longest)
    sums = [opened.dataset(split).column("teacher_nll_sum") for split in opened.splits]
    nll = float(np.concatenate(sums).astype(np.float64).sum())
    whole = own and counted == tokens and labelled == written_rows
    return Written(tokens, nll / tokens, (logprob + nll) / tokens if whole else None, counted)


_COLUMNS = ["completion_tokens", "logprob", "ids_from", "input_ids"]


def _are_own_draws(end: GenerationEnd) -> bool:
    """Whether all completions were kept and sampled from the model's unmodified distribution."""
    sampling, model = end.contract.sampling, end.contract.model
    filtered = sampling.top_k is not None or sampling.min_p is not None or sampling.top_p not in (None, 1)
    changed = isinstance(model, ServedModel) and model.own_settings
    return sampling.temperature == 1 and not filtered and not changed and not end.contract.dropped


def _check_of_these(cache: Cache, written: str, labelled: Counter[int], rows: Counter[int], longest: int) -> None:
    """Check that the rows of the cache are in the data set.

    A cache whose rows may be truncated or tokenized again from text is not checked, since its rows
    differ.

    Raises:
        CacheError: rows are missing in the data set.
    """
    contract = cache.manifest.contract
    if contract.source.columns.input_ids is None or contract.tokenization.max_length < longest:
        return
    others = (labelled - rows).total()
    if others:
        raise CacheError(
            f"{cache.where}: is not of {written}: {others:,} of its {labelled.total():,} rows are not among the {rows.total():,} "
            "written there; name the data set that this cache was made from"
        )


@dataclass(frozen=True, slots=True)
class WrittenCache:
    """A cache of texts that the student of a round generated."""

    round: int
    written: str
    """Directory of the generated data set."""
    section: int
    """Number of the section of `generate` that wrote it, from 0."""


def written_caches(steps: Sequence[Resolved]) -> Mapping[str, WrittenCache]:
    """Map the place of each cache of generated texts to its round and data set."""
    outputs = {
        (step.round, place_of(config.output)): (config.output, step.section_number)
        for step, config in steps
        if isinstance(config, GenerateConfig)
    }
    found: dict[str, WrittenCache] = {}
    for step, config in steps:
        if isinstance(config, CacheLogitsConfig) and step.round is not None:
            written = outputs.get((step.round, place_of(config.data.dataset)))
            if written is not None:
                found[place_of(config.output)] = WrittenCache(step.round, *written)
    return found


def progress(cache: str, made_of: WrittenCache, told: dict[tuple[int, int], Written]) -> str | None:
    """One line on the progress of a round; None if its cache is not finished, or behind a URL.

    Args:
        told: (section, round) -> measurements of earlier rounds; this round is added.
    """
    if not (Path(cache) / "manifest.json").is_file():
        return None
    found = told[made_of.section, made_of.round] = measure_written(cache, made_of.written)
    before = told.get((made_of.section, made_of.round - 1))
    nll = f" (round {made_of.round - 1}: {before.teacher_nll:.3f})" if before is not None else ""
    what = "what the student wrote" + (" and its prompts" if found.tokens > found.written_tokens else "")
    line = f"round {made_of.round}: the teacher's loss on {what} is {found.teacher_nll:.3f} nats a token{nll}"
    if found.reverse_kl is not None:
        line += f"; KL(student || teacher) {found.reverse_kl:.3f}"
        if before is not None and before.reverse_kl is not None:
            line += f" ({before.reverse_kl:.3f})"
    if found.tokens == found.written_tokens:
        return f"{line}; {found.tokens:,} tokens of {made_of.written}"
    if found.tokens < found.written_tokens:
        return f"{line}; {found.tokens:,} of the {found.written_tokens:,} tokens of {made_of.written} are in {cache}"
    return (
        f"{line}; {found.tokens:,} tokens of {made_of.written}, of which {found.written_tokens:,} were written: {cache} learns the prompts too; "
        "labels_column: labels leaves them out"
    )


def warn_of_own_labels(steps: Sequence[Resolved]) -> None:
    """Warn if a student would be trained on its own generated tokens as hard labels."""
    written = written_caches(steps)
    for _, config in steps:
        if not isinstance(config, TrainStudentConfig) or config.hard_labels == "teacher":
            continue
        own = [cache for cache in config.cache if place_of(cache) in written]
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
