"""Bring your own logits: a cache from rows that some other program has labelled (vLLM, an ensemble, another framework)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.cache import Cache, Layout, Plan
from pipeline.cache.format.codec import content_hash
from pipeline.cache.format.manifest import NAME
from pipeline.cache.format.schema import cache_schema, describe
from pipeline.cache.storage.urls import is_url
from pipeline.cache.writing.build import begin, finish, record
from pipeline.cache.writing.writer import write_shard
from pipeline.capture.plan import library_versions
from pipeline.capture.shard import label_rows
from pipeline.errors import BadRowError, EncodingError, MisuseError
from pipeline.models import tokenizer_info
from pipeline.records import (
    NO_LABEL,
    BadRow,
    CachedExample,
    Columns,
    Contract,
    Encoding,
    ModelInfo,
    Receipt,
    Sampled,
    Scalar,
    ShardPlan,
    SoftLabels,
    SourceInfo,
    TeacherScores,
    Tokenization,
    TokenizedExample,
)
from pipeline.softlabels import counter_uniforms, narrow
from pipeline.sources.files.loading import redact
from pipeline.tasks import Task, get_task

#: Logits that are encoded at once: 8 MB in float32.
_BATCH_LOGITS = 2 << 20


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """Tokens, and what a teacher predicts at their supervised positions: dense logits or ready soft labels."""

    input_ids: Sequence[int] | np.ndarray
    logits: Tensor | np.ndarray | None = None
    """(N, V) float, row n made at supervised position n."""
    soft_labels: SoftLabels | None = None
    """N positions; with `scores`, where they are known."""
    scores: TeacherScores | None = None
    supervised: Sequence[bool] | np.ndarray | None = None
    """(T,) bool, token tasks. Default: every position but the last."""
    label: int | None = None
    text: str | None = None
    text_pair: str | None = None
    token_type_ids: Sequence[int] | np.ndarray | None = None
    text_bytes: int = 0
    split: str = "train"
    kept: Mapping[str, Scalar] = field(default_factory=dict)
    """Columns to copy into the cache, those of the first row, as text."""


def write_cache(
    rows: Iterable[LabelledRow | BadRow],
    output: str | Path,
    *,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    teacher: str | ModelInfo,
    num_classes: int | None = None,
    label_names: tuple[str, ...] | None = None,
    max_length: int | None = None,
    source: str = "in-memory",
    rows_per_shard: int = 1000,
    seed: int = 0,
    on_bad_row: Literal["stop", "skip"] = "stop",
    overwrite: bool = False,
) -> Cache:
    """Write a cache from labelled rows, as they come.

    Args:
        rows: in any number; the rows of a split come one after another. Nothing but one shard is held in memory.
        encoding: what is kept of dense logits; of ready soft labels, the encoding that they have.
        teacher: who made the logits: a name, or all that is known.
        num_classes: V; default: the tokenizer's vocabulary (token tasks), or the number of label names.
        max_length: the longest row that is allowed; default: the longest that comes.
        on_bad_row: `skip`: a `BadRow` among the rows, and a row whose parts do not fit each other, is set aside.

    Returns:
        The finished cache. An iterator cannot be wound forward: a run that was stopped starts anew.

    Raises:
        MisuseError: no number of classes.
        BadRowError: a row whose parts do not fit each other; names its number.
        CacheError: see its subclasses; the soft labels may be out of step with the tokens.
    """
    chosen = get_task(task)
    classes = num_classes or (len(tokenizer) if chosen.classes_are_tokens else len(label_names or ()))
    if classes < 2:
        raise MisuseError("write_cache: give label_names=..., or num_classes=... of at least 2")
    if not chosen.classes_are_tokens and label_names is None:
        label_names = tuple(f"LABEL_{i}" for i in range(classes))
    iterator = iter(rows)
    head: list[LabelledRow | BadRow] = []
    first = None
    for row in iterator:
        head.append(row)
        if isinstance(row, LabelledRow):
            first = row
            break
    if first is None:
        raise MisuseError("write_cache: expected rows, found none")
    schema = cache_schema(
        encoding,
        classes,
        token_classes=chosen.classes_are_tokens,
        token_type_ids=first.token_type_ids is not None,
        text=first.text is not None and not chosen.classes_are_tokens,
        text_pair=first.text_pair is not None,
        kept=dict.fromkeys(first.kept, pa.string()),
    )
    info = (
        teacher
        if isinstance(teacher, ModelInfo)
        else ModelInfo(teacher, None, "unknown", "unknown", 0, "unknown", None)
    )
    contract = Contract(
        task=task,
        encoding=encoding,
        num_classes=classes,
        label_names=None if chosen.classes_are_tokens else label_names,
        teacher=info,
        tokenizer=tokenizer_info(tokenizer),
        source=SourceInfo(source, None, None, Columns(text=None, label=None), {}),
        tokenization=Tokenization(max_length or 0),
        store_text=first.text is not None,
        batch_tokens=0,
        seed=seed,
        versions=library_versions(),
        columns=describe(schema),
        on_bad_row=on_bad_row,
    )
    if is_url(str(output)):
        raise MisuseError(f"{redact(str(output))}: write_cache and import write to a directory; push it from there")
    layout = begin(Path(output), Plan(contract, ()), tokenizer, overwrite=overwrite)
    if layout.manifest.is_file():
        raise MisuseError(f"{output}: holds a finished cache; use another output, or overwrite=True")
    _drop_shards(layout)
    plans, longest = [], 2
    for split, numbered in _by_split(itertools.chain(head, iterator)):
        for number in itertools.count():
            part = list(itertools.islice(numbered, rows_per_shard))
            if not part:
                break
            plan = ShardPlan(f"{split}-{number:05d}", split, part[0][0], part[-1][0] + 1)
            cached, bad = _split_bad(chosen, part, contract, seed)
            longest = max([longest, *(row.example.num_tokens for row in cached)])
            if max_length is not None and longest > max_length:
                raise BadRowError(
                    f"rows {plan.start} to {plan.stop - 1}: expected at most {max_length} tokens, found {longest}; set max_length"
                )
            written = write_shard(layout.shard(plan.name), plan, cached, schema)
            record(layout, Receipt(written, plan, (), "unknown", 0.0, 0.0, bad))
            plans.append(plan)
    contract = dataclasses.replace(contract, tokenization=Tokenization(max_length or longest))
    return finish(layout, Plan(contract, tuple(plans)))


def _split_bad(
    task: Task, part: Iterable[tuple[int, LabelledRow | BadRow]], contract: Contract, seed: int
) -> tuple[list[CachedExample], tuple[BadRow, ...]]:
    """The rows of a shard, and those that are set aside.

    Raises:
        BadRowError: the first that is bad, where the contract says stop.
    """
    cached: list[CachedExample] = []
    bad: list[BadRow] = []
    waiting: list[_Dense] = []

    def set_aside(number: int, split: str, error: BadRowError) -> None:
        if contract.on_bad_row == "stop":
            raise error
        bad.append(BadRow(split, number, " ".join(str(error).split())))

    def encode_waiting() -> None:
        """The rows that wait, in one batch; where it cannot be encoded, one by one."""
        try:
            cached.extend(_encoded(task, waiting, contract, seed))
        except EncodingError:
            for dense in waiting:
                try:
                    cached.extend(_encoded(task, [dense], contract, seed))
                except EncodingError as error:
                    number = dense.example.source_row
                    set_aside(number, dense.split, BadRowError(f"row {number}: {error}"))
        waiting.clear()

    held = 0

    for number, row in part:
        try:
            if isinstance(row, BadRow):
                raise BadRowError(row.reason)
            made = _checked(task, row, number, contract, seed)
        except BadRowError as error:
            encode_waiting()  # what is wrong with an earlier row comes first
            set_aside(number, row.split, error)
            continue
        if waiting and (
            isinstance(made, CachedExample)
            or made.logits.dtype != waiting[0].logits.dtype
            or held + made.logits.numel() > _BATCH_LOGITS
        ):
            encode_waiting()
        if isinstance(made, CachedExample):
            cached.append(made)
        else:
            held = made.logits.numel() + (held if waiting else 0)
            waiting.append(made)
    encode_waiting()
    return cached, tuple(bad)


@dataclass(frozen=True, slots=True)
class _Dense:
    """A row that was checked, and is to be encoded."""

    example: TokenizedExample
    logits: Tensor
    """(N, V)."""
    split: str


def _encoded(task: Task, dense: Sequence[_Dense], contract: Contract, seed: int) -> list[CachedExample]:
    """Rows of one split and one precision with their soft labels.

    Raises:
        EncodingError: logits of some row cannot be encoded.
    """
    if not dense:
        return []
    split = dense[0].split
    uniforms = None
    if isinstance(contract.encoding, Sampled):
        numbered = [(each.example.source_row, np.arange(len(each.logits))) for each in dense]
        uniforms = torch.cat([counter_uniforms(seed, split, row, 0, positions) for row, positions in numbered])
    return label_rows(
        task,
        [each.example for each in dense],
        torch.cat([each.logits for each in dense]),
        contract.encoding,
        split=split,
        seed=seed,
        uniforms=uniforms,
    )


def _by_split(
    rows: Iterable[LabelledRow | BadRow],
) -> Iterator[tuple[str, Iterator[tuple[int, LabelledRow | BadRow]]]]:
    seen: set[str] = set()
    for split, group in itertools.groupby(rows, key=lambda row: row.split):
        if not NAME.fullmatch(split):
            raise MisuseError(f"split {split!r}: expected letters, digits, _, . and - only")
        if split in seen:
            raise BadRowError(
                f"rows of split {split!r}: expected one after another, found them in two places; sort the rows by split"
            )
        seen.add(split)
        yield split, enumerate(group)


def _checked(task: Task, row: LabelledRow, number: int, contract: Contract, seed: int) -> CachedExample | _Dense:
    """One row, its parts checked against each other; ready soft labels are taken as they are."""
    ids = np.asarray(row.input_ids, dtype=np.int32)
    supervised = None
    if task.classes_are_tokens:
        default = np.arange(len(ids)) < len(ids) - 1
        supervised = default if row.supervised is None else np.asarray(row.supervised, dtype=bool)
        if len(supervised) != len(ids) or not supervised.any() or supervised[-1]:
            raise BadRowError(
                f"row {number}: supervised: expected {len(ids)} flags, one or more of them set and the last not"
            )
    example = TokenizedExample(
        source_row=number,
        piece=0,
        input_ids=ids,
        supervised=supervised,
        token_type_ids=None if row.token_type_ids is None else np.asarray(row.token_type_ids, dtype=np.int32),
        label=row.label,
        text=row.text,
        text_pair=row.text_pair,
        text_bytes=row.text_bytes,
        kept=row.kept,
    )
    labels = task.hard_labels([example])
    tokens = contract.tokenizer.vocabulary_size
    _check(
        number,
        len(ids) > 0 and ids.min() >= 0 and ids.max() < tokens,
        f"token ids of 0 to {tokens - 1}",
        ids[:8].tolist(),
    )
    known = labels[labels != NO_LABEL]
    _check(
        number,
        not len(known) or (known.min() >= 0 and known.max() < contract.num_classes),
        f"labels of 0 to {contract.num_classes - 1}",
        known[:8].tolist(),
    )
    if row.logits is not None:
        logits = torch.as_tensor(row.logits).detach().cpu()
        _check(number, logits.dim() == 2, "logits of two dimensions, (N, V)", tuple(logits.shape))
        logits = logits[:, : contract.num_classes]
        _check(
            number,
            tuple(logits.shape) == (example.num_positions, contract.num_classes),
            f"logits of shape {(example.num_positions, contract.num_classes)}",
            tuple(logits.shape),
        )
        return _Dense(example, logits, row.split)
    if row.soft_labels is not None:
        soft = narrow(row.soft_labels, counter_uniforms(seed, row.split, number, 0, np.arange(len(row.soft_labels))))
        _check(
            number, len(soft) == example.num_positions, f"soft labels of {example.num_positions} positions", len(soft)
        )
        _check(number, soft.encoding == contract.encoding, str(contract.encoding), soft.encoding)
        _check(number, soft.num_classes == contract.num_classes, f"{contract.num_classes} classes", soft.num_classes)
        scores = row.scores or _scores_of_top(soft, torch.from_numpy(labels))
    else:
        raise BadRowError(f"row {number}: expected logits or soft_labels, found neither")
    sums = float(scores.nll.double().sum()), float(scores.entropy.double().sum())
    return CachedExample(example, soft, *sums, content_hash(example))


def _scores_of_top(soft: SoftLabels, labels: Tensor) -> TeacherScores:
    """What the kept classes say: nan where the hard label is not among them; the entropy is not known."""
    owner = torch.repeat_interleave(torch.arange(len(soft)), soft.top_offsets.diff())
    nll = torch.full((len(soft),), torch.nan)
    hit = soft.top_ids == labels[owner]
    nll[owner[hit]] = -soft.top_logprobs[hit]
    return TeacherScores(nll.masked_fill(labels == NO_LABEL, 0.0), torch.full((len(soft),), torch.nan))


def _check(number: int, condition: bool, expected: str, found: object) -> None:
    if not condition:
        raise BadRowError(f"row {number}: expected {expected}, found {found}")


def _drop_shards(layout: Layout) -> None:
    """What a stopped run has left; nothing of it can be taken over."""
    for path in [*layout.data.glob("*.parquet"), *(p for p in layout.plan.parent.glob("*.json") if p != layout.plan)]:
        path.unlink()
