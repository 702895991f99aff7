"""Bring your own logits: a cache from rows that some other program has labelled (vLLM, an ensemble, another framework)."""

from __future__ import annotations

import dataclasses
import itertools
import math
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
from pipeline.cache.format.rows import gather, make_block
from pipeline.cache.format.schema import cache_schema, describe
from pipeline.cache.storage.urls import is_url
from pipeline.cache.writing.build import begin, finish, record
from pipeline.cache.writing.writer import write_shard
from pipeline.capture.plan import library_versions
from pipeline.capture.shard import encode_rows, row_sums
from pipeline.errors import BadRowError, EncodingError, MisuseError
from pipeline.models import tokenizer_info
from pipeline.progress import Progress
from pipeline.records import (
    NO_LABEL,
    BadRow,
    Columns,
    Contract,
    Encoding,
    ModelInfo,
    Receipt,
    RowBlock,
    Sampled,
    Scalar,
    ShardPlan,
    SoftLabels,
    SourceInfo,
    TeacherScores,
    Tokenization,
    TokenizedExample,
)
from pipeline.softlabels import concatenate, counter_uniforms, narrow
from pipeline.softlabels.ragged import owners
from pipeline.sources.files.loading import redact
from pipeline.tasks import Task, get_task, token_block

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
    progress = Progress("rows to the cache")
    for split, numbered in _by_split(itertools.chain(head, iterator)):
        for number in itertools.count():
            part = list(itertools.islice(numbered, rows_per_shard))
            if not part:
                break
            plan = ShardPlan(f"{split}-{number:05d}", split, part[0][0], part[-1][0] + 1)
            blocks, bad = _split_bad(chosen, part, contract, schema)
            longest = max([longest, *(int(block.lists["input_ids"].counts.max()) for block in blocks)])
            if max_length is not None and longest > max_length:
                raise BadRowError(
                    f"rows {plan.start} to {plan.stop - 1}: expected at most {max_length} tokens, found {longest}; set max_length"
                )
            whole = gather([(block, 0, len(block)) for block in blocks]) if blocks else ()
            written = write_shard(layout.shard(plan.name), plan, whole, schema)
            tokens = sum(int(block.lists["input_ids"].counts.sum()) for block in blocks)
            progress.update(len(part), tokens=tokens)
            record(layout, Receipt(written, plan, (), "unknown", 0.0, 0.0, bad))
            plans.append(plan)
    progress.close()
    contract = dataclasses.replace(contract, tokenization=Tokenization(max_length or longest))
    return finish(layout, Plan(contract, tuple(plans)))


Numbered = tuple[int, LabelledRow | BadRow]


def _split_bad(
    task: Task, part: Sequence[Numbered], contract: Contract, schema: pa.Schema
) -> tuple[list[RowBlock], tuple[BadRow, ...]]:
    """The rows of a shard, and those that are set aside.

    Raises:
        BadRowError: the first that is bad, where the contract says stop.
    """
    blocks: list[RowBlock] = []
    bad: list[BadRow] = []

    def make(batch: Sequence[Numbered]) -> None:
        """One block; of a batch with a bad row one of each half, down to the row itself."""
        try:
            blocks.append(_make(task, batch, contract, schema))
        except (BadRowError, EncodingError) as error:
            if len(batch) > 1:
                make(batch[: len(batch) // 2])
                make(batch[len(batch) // 2 :])
                return
            number, row = batch[0]
            reason = f"row {number}: {error}" if isinstance(error, EncodingError) else str(error)
            if contract.on_bad_row == "stop":
                raise BadRowError(reason) from None
            bad.append(BadRow(row.split, number, " ".join(reason.split())))

    for batch in _batches(part):
        make(batch)
    return blocks, tuple(bad)


def _batches(part: Sequence[Numbered]) -> Iterator[Sequence[Numbered]]:
    """Rows one after another whose soft labels are of one kind and precision, up to so many logits."""
    start, held, kind = 0, 0, ""
    for i, (_, row) in enumerate(part):
        logits = None if isinstance(row, BadRow) else row.logits
        size = 0 if logits is None else math.prod(np.shape(logits))
        found = kind if isinstance(row, BadRow) else "ready" if logits is None else str(getattr(logits, "dtype", None))
        if i > start and (found != kind or held + size > _BATCH_LOGITS):
            yield part[start:i]
            start, held = i, 0
        held, kind = held + size, found
    yield part[start:]


def _make(task: Task, batch: Sequence[Numbered], contract: Contract, schema: pa.Schema) -> RowBlock:
    """Rows of one split with their soft labels, as they are stored. What a message says is of the first row: it is asked for where that is the only one.

    Raises:
        BadRowError: parts of a row do not fit each other.
        EncodingError: logits of some row cannot be encoded.
    """
    rows = [row for _, row in batch if isinstance(row, LabelledRow)]
    if len(rows) < len(batch):
        raise BadRowError(next(row.reason for _, row in batch if isinstance(row, BadRow)))
    examples = [_tokenized(task, row, number) for (number, _), row in zip(batch, rows, strict=True)]
    _check_ids(task, examples, contract)
    split, seed = rows[0].split, contract.seed
    uniforms = None
    if isinstance(contract.encoding, Sampled):
        ends = [np.arange(example.num_positions) for example in examples]
        drawn = [counter_uniforms(seed, split, e.source_row, 0, end) for e, end in zip(examples, ends, strict=True)]
        uniforms = torch.cat(drawn)
    if rows[0].logits is not None:
        logits = torch.cat([_logits(row, example, contract) for row, example in zip(rows, examples, strict=True)])
        soft, scores = encode_rows(task, examples, logits, contract.encoding, split=split, seed=seed, uniforms=uniforms)
    else:
        given = [_ready(row, example, contract) for row, example in zip(rows, examples, strict=True)]
        soft = concatenate(given)
        soft = soft if uniforms is None else narrow(soft, uniforms)
        scores = _scores(rows, soft, torch.from_numpy(task.hard_labels(examples)), [len(each) for each in given])
    counts = [example.num_positions for example in examples]
    return make_block(
        examples,
        soft,
        row_sums(scores.nll, counts),
        row_sums(scores.entropy, counts),
        [content_hash(example) for example in examples],
        schema,
        counts=counts,
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


def _tokenized(task: Task, row: LabelledRow, number: int) -> TokenizedExample:
    ids = np.asarray(row.input_ids, dtype=np.int32)
    supervised = None
    if task.classes_are_tokens:
        default = np.arange(len(ids)) < len(ids) - 1
        supervised = default if row.supervised is None else np.asarray(row.supervised, dtype=bool)
        if len(supervised) != len(ids) or not supervised.any() or supervised[-1]:
            raise BadRowError(
                f"row {number}: supervised: expected {len(ids)} flags, one or more of them set and the last not"
            )
    return TokenizedExample(
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


def _check_ids(task: Task, examples: Sequence[TokenizedExample], contract: Contract) -> None:
    number = examples[0].source_row
    tokens = token_block(examples)
    ids, limit = tokens.input_ids, contract.tokenizer.vocabulary_size
    fine = bool(ids.counts.all()) and ids.values.min() >= 0 and ids.values.max() < limit
    _check(number, fine, f"token ids of 0 to {limit - 1}", ids.values[:8].tolist())
    labels = task.hard_labels(tokens)
    known = labels[labels != NO_LABEL]
    fine = not len(known) or (known.min() >= 0 and known.max() < contract.num_classes)
    _check(number, fine, f"labels of 0 to {contract.num_classes - 1}", known[:8].tolist())


def _logits(row: LabelledRow, example: TokenizedExample, contract: Contract) -> Tensor:
    """(N, V)."""
    logits = torch.as_tensor(row.logits).detach().cpu()
    _check(example.source_row, logits.dim() == 2, "logits of two dimensions, (N, V)", tuple(logits.shape))
    logits = logits[:, : contract.num_classes]
    shape = (example.num_positions, contract.num_classes)
    _check(example.source_row, logits.shape == shape, f"logits of shape {shape}", tuple(logits.shape))
    return logits


def _ready(row: LabelledRow, example: TokenizedExample, contract: Contract) -> SoftLabels:
    """Soft labels as they were given."""
    soft, number = row.soft_labels, example.source_row
    if soft is None:
        raise BadRowError(f"row {number}: expected logits or soft_labels, found neither")
    positions = example.num_positions
    _check(number, len(soft) == positions, f"soft labels of {positions} positions", len(soft))
    _check(number, soft.encoding == contract.encoding, str(contract.encoding), soft.encoding)
    _check(number, soft.num_classes == contract.num_classes, f"{contract.num_classes} classes", soft.num_classes)
    return soft


def _scores(rows: Sequence[LabelledRow], soft: SoftLabels, labels: Tensor, counts: Sequence[int]) -> TeacherScores:
    """Those given, and else what the kept classes say: nan where the hard label is not among them; the entropy is not known."""
    owner = owners(soft.top_offsets)
    nll = torch.full((len(soft),), torch.nan)
    hit = soft.top_ids == labels[owner]
    nll[owner[hit]] = -soft.top_logprobs[hit]
    nll, entropy = nll.masked_fill(labels == NO_LABEL, 0.0), torch.full((len(soft),), torch.nan)
    for row, stop, count in zip(rows, np.cumsum(counts).tolist(), counts, strict=True):
        if row.scores is not None:
            nll[stop - count : stop] = row.scores.nll
            entropy[stop - count : stop] = row.scores.entropy
    return TeacherScores(nll, entropy)


def _check(number: int, condition: bool, expected: str, found: object) -> None:
    if not condition:
        raise BadRowError(f"row {number}: expected {expected}, found {found}")


def _drop_shards(layout: Layout) -> None:
    """What a stopped run has left; nothing of it can be taken over."""
    for path in [*layout.data.glob("*.parquet"), *(p for p in layout.plan.parent.glob("*.json") if p != layout.plan)]:
        path.unlink()
