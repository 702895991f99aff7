"""Write a cache from rows labelled by another program (vLLM, an ensemble, another framework)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.cache import Cache, Layout, Plan
from pipeline.cache.format.codec import content_hash, num_tokens_of
from pipeline.cache.format.manifest import NAME
from pipeline.cache.format.rows import gather, make_block
from pipeline.cache.format.schema import cache_schema, describe
from pipeline.cache.storage.urls import is_url
from pipeline.cache.writing.build import begin, finish, record
from pipeline.cache.writing.writer import write_shard
from pipeline.capture.labelled import (
    LabelledRow,
    check_ids,
    label_logprobs,
    logits_of,
    ready_of,
    scores_of,
    tokenized,
)
from pipeline.capture.plan import library_versions
from pipeline.capture.shard import encode_rows, row_sums
from pipeline.errors import BadRowError, EncodingError, MisuseError
from pipeline.models import tokenizer_info
from pipeline.models.processors import in_place_of_tokenizer
from pipeline.progress import Progress
from pipeline.records import (
    BadRow,
    Columns,
    Contract,
    Encoding,
    ModelInfo,
    Receipt,
    RowBlock,
    Sampled,
    ShardPlan,
    SourceInfo,
    Tokenization,
    check_is_encoding,
)
from pipeline.softlabels import concatenate, counter_uniforms, narrow
from pipeline.sources.files.loading import redact
from pipeline.tasks import Task, get_task
from pipeline.tasks.answers.candidates import ENDS, choice_names

#: Number of logits that are encoded at once: 8 MB in float32.
_BATCH_LOGITS = 2 << 20


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
    store_text: bool | None = None,
    store_label_logprobs: bool = False,
    overwrite: bool = False,
) -> Cache:
    """Write a cache from a stream of labelled rows.

    Args:
        rows: any number of rows; the rows of a split must be consecutive. Only one shard is held in
            memory.
        encoding: how dense logits are encoded; ready soft labels must have this encoding.
        teacher: the model that made the logits: a name, or a `ModelInfo`.
        num_classes: V; default: the tokenizer's vocabulary size (token tasks), or the number of
            label names.
        max_length: the longest row allowed; default: the longest row that occurs. Tasks whose
            classes are places require it.
        store_text: keep the texts or messages of the rows. None: classifiers keep texts if the rows
            have them.
        store_label_logprobs: language models: keep the log-probability of each next token. It is
            known for dense logits, for soft labels with `scores`, and if the token is among the
            kept classes; a row where it is unknown at some position is a bad row.
        on_bad_row: "skip": skip each `BadRow` and each row whose parts do not fit each other.

    Returns:
        The finished cache. An interrupted run starts again from the first row; it cannot resume in
            the middle of `rows`.

    Raises:
        MisuseError: no rows, no number of classes, or arguments that do not fit the task or the
            rows.
        BadRowError: the parts of a row do not fit each other; the message has the row's number.
        CacheError: see the subclasses; for example, soft labels that do not fit the tokens.
    """
    chosen = get_task(task)
    check_is_encoding(encoding)
    if chosen.names == "positions" and not label_names:
        raise MisuseError("write_cache: give label_names=...: rows have one position per name")
    if chosen.names == "places":
        if max_length is None:
            raise MisuseError("write_cache: give max_length=...: the classes are the places of the longest row")
        num_classes, label_names = max_length, ENDS
    usual = len(tokenizer) if chosen.predicts_tokens else len(label_names or ())
    classes = num_classes or usual
    if chosen.names == "positions":
        classes = 1 if chosen.target == "score" else 2
    elif classes < 2:
        raise MisuseError("write_cache: give label_names=..., or num_classes=... of at least 2")
    if chosen.names is not None and label_names is None:
        usual_names = tuple(f"LABEL_{i}" for i in range(classes))
        label_names = choice_names(classes) if chosen.names == "choices" else usual_names
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
    if chosen.ranks and first.group is None:
        raise MisuseError(f"write_cache: rows of {chosen.name} need group=..., one value for all rows of a list")
    if first.group is not None and not chosen.ranks:
        raise MisuseError(f"write_cache: group=... names the lists of rankings; rows of {chosen.name} have none")
    if (first.image is not None) != (chosen.reads == "images"):
        raise MisuseError(
            f"write_cache: rows of {chosen.name} have {'image' if chosen.reads == 'images' else 'input_ids'}=..."
        )
    if chosen.reads == "images":
        tokenizer = in_place_of_tokenizer(tokenizer)
    _check_stored(chosen, first, store_text=store_text, store_label_logprobs=store_label_logprobs)
    keeps = store_text is not False if chosen.stores_text else bool(store_text)
    schema = cache_schema(
        encoding,
        classes,
        labels=chosen.label_source,
        marks_positions=chosen.marks_positions,
        token_type_ids=first.token_type_ids is not None,
        words=keeps and first.words is not None,
        groups=first.group is not None,
        text=keeps and first.text is not None,
        text_pair=first.text_pair is not None,
        messages=keeps and first.messages is not None,
        images=chosen.reads == "images",
        documents=chosen.reads == "choices",
        label_logprobs=store_label_logprobs,
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
        label_names=label_names if chosen.names is not None else None,
        teacher=info,
        tokenizer=tokenizer_info(tokenizer),
        source=SourceInfo(
            source,
            None,
            None,
            Columns(
                text=None,
                image=None if first.image is None else "image",
                label=None,
                group=None if first.group is None else "group",
            ),
            {},
        ),
        tokenization=Tokenization(max_length or 0, num_choices=classes if chosen.reads == "choices" else None),
        store_text=store_text is not False
        and any(each is not None for each in (first.text, first.messages, first.words)),
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
    plans, longest = [], 2 if chosen.reads != "images" else 1
    progress = Progress("rows to the cache")
    for split, numbered in _by_split(itertools.chain(head, iterator)):
        for number in itertools.count():
            part = list(itertools.islice(numbered, rows_per_shard))
            if not part:
                break
            plan = ShardPlan(f"{split}-{number:05d}", split, part[0][0], part[-1][0] + 1)
            blocks, bad = _split_bad(chosen, part, contract, schema)
            counts = [block.lists["input_ids"].counts for block in blocks if "input_ids" in block.lists]
            longest = max([longest, *(int(each.max()) for each in counts)])
            if max_length is not None and longest > max_length:
                raise BadRowError(
                    f"rows {plan.start} to {plan.stop - 1}: expected at most {max_length} tokens, found {longest}; set max_length"
                )
            whole = gather([(block, 0, len(block)) for block in blocks]) if blocks else ()
            written = write_shard(layout.shard(plan.name), plan, whole, schema)
            progress.update(len(part), tokens=sum(map(num_tokens_of, blocks)))
            record(layout, Receipt(written, plan, (), "unknown", 0.0, 0.0, bad))
            plans.append(plan)
    progress.close()
    settings = dataclasses.replace(contract.tokenization, max_length=max_length or longest)
    contract = dataclasses.replace(contract, tokenization=settings)
    return finish(layout, Plan(contract, tuple(plans)))


Numbered = tuple[int, LabelledRow | BadRow]


def _split_bad(
    task: Task, part: Sequence[Numbered], contract: Contract, schema: pa.Schema
) -> tuple[list[RowBlock], tuple[BadRow, ...]]:
    """Make the blocks of a shard's rows, and collect its bad rows.

    Raises:
        BadRowError: the first bad row, if the contract's `on_bad_row` is "stop".
    """
    blocks: list[RowBlock] = []
    bad: list[BadRow] = []

    def make(batch: Sequence[Numbered]) -> None:
        """Make one block; split a batch with a bad row in halves until the bad row is alone."""
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
    """Group consecutive rows with logits of one type and dtype, up to `_BATCH_LOGITS` logits."""
    start, held = 0, 0
    kind: tuple[type, object] | None = None
    for i, (_, row) in enumerate(part):
        logits = None if isinstance(row, BadRow) else row.logits
        size = 0 if logits is None else math.prod(np.shape(logits))
        found = kind if isinstance(row, BadRow) else (type(logits), getattr(logits, "dtype", None))
        if i > start and (found != kind or held + size > _BATCH_LOGITS):
            yield part[start:i]
            start, held = i, 0
        held, kind = held + size, found
    yield part[start:]


def _make(task: Task, batch: Sequence[Numbered], contract: Contract, schema: pa.Schema) -> RowBlock:
    """Encode rows of one split as rows of a cache.

    Error messages may name the first row of the batch only; the caller retries single rows.

    Raises:
        BadRowError: the parts of a row do not fit each other.
        EncodingError: the logits of some row cannot be encoded.
    """
    rows = [row for _, row in batch if isinstance(row, LabelledRow)]
    if len(rows) < len(batch):
        raise BadRowError(next(row.reason for _, row in batch if isinstance(row, BadRow)))
    examples = [
        tokenized(task, row, number, len(contract.label_names or ()))
        for (number, _), row in zip(batch, rows, strict=True)
    ]
    check_ids(task, examples, contract)
    bare = next((each for each in examples if each.words is None), None) if "position_words" in schema.names else None
    if bare is not None:
        raise BadRowError(f"row {bare.source_row}: expected words, as the first row has, found none")
    lone = next((each for each in examples if each.group is None), None) if "score_group" in schema.names else None
    if lone is not None:
        raise BadRowError(f"row {lone.source_row}: expected a group, as the first row has, found none")
    split, seed = rows[0].split, contract.seed
    uniforms = None
    if isinstance(contract.encoding, Sampled):
        ends = [np.arange(example.num_positions) for example in examples]
        drawn = [counter_uniforms(seed, split, e.source_row, 0, end) for e, end in zip(examples, ends, strict=True)]
        uniforms = torch.cat(drawn)
    if rows[0].logits is not None:
        logits = torch.cat([logits_of(row, example, contract) for row, example in zip(rows, examples, strict=True)])
        soft, scores = encode_rows(task, examples, logits, contract.encoding, split=split, seed=seed, uniforms=uniforms)
    else:
        given = [ready_of(row, example, contract) for row, example in zip(rows, examples, strict=True)]
        soft = concatenate(given)
        soft = soft if uniforms is None else narrow(soft, uniforms)
        scores = scores_of(rows, soft, torch.from_numpy(task.hard_labels(examples)), [len(each) for each in given])
    counts = [example.num_positions for example in examples]
    return make_block(
        examples,
        soft,
        row_sums(scores.nll, counts),
        row_sums(scores.entropy, counts),
        [content_hash(example) for example in examples],
        schema,
        counts=counts,
        label_logprobs=label_logprobs(rows, examples, scores, contract.encoding)
        if "label_logprobs" in schema.names
        else None,
    )


def _check_stored(task: Task, first: LabelledRow, *, store_text: bool | None, store_label_logprobs: bool) -> None:
    if store_label_logprobs and task.label_source != "tokens":
        raise MisuseError("write_cache: store_label_logprobs is for language models; leave it out")
    is_other = task.label_source not in ("positions", "hidden", "target") and first.labels is not None
    if is_other or (task.other_tokenizers != "words" and first.words is not None):
        raise MisuseError(
            f"write_cache: words and labels of words are of token classification; the rows are of {task.name}"
        )
    if store_text and first.text is None and first.messages is None and first.words is None:
        raise MisuseError(
            f"write_cache: store_text: expected rows with {'words' if task.other_tokenizers == 'words' else 'text or messages'}, found none in the first"
        )
    if first.messages is not None and (first.text is not None or task.label_source != "tokens"):
        raise MisuseError("write_cache: messages are of language models, in place of text; give one of the two")


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
        yield split, enumerate(_lists_together(group))


def _lists_together(rows: Iterable[LabelledRow | BadRow]) -> Iterator[LabelledRow | BadRow]:
    """Yield the rows unchanged.

    Raises:
        BadRowError: the rows of a list are not consecutive.
    """
    seen: set[int | str] = set()
    before: int | str | None = None
    for number, row in enumerate(rows):
        group = row.group if isinstance(row, LabelledRow) else before
        if group is not None and group != before and group in seen:
            raise BadRowError(
                f"row {number}: group {group!r}: expected the rows of a list one after another; sort them"
            )
        if group is not None:
            seen.add(group)
            before = group
        yield row


def _drop_shards(layout: Layout) -> None:
    """Delete the shards and receipts of an interrupted run; they cannot be reused."""
    for path in [*layout.data.glob("*.parquet"), *(p for p in layout.plan.parent.glob("*.json") if p != layout.plan)]:
        path.unlink()
