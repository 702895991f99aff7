"""Collate rows of a cache into a StudentBatch, and convert it to and from nested tensors.

Trainer and accelerate move the nested tensors between devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.cache import CacheDataset
from pipeline.cache.format.codec import (
    COLUMNS,
    LABEL_LOGPROBS,
    TEACHER_POSITION,
    labelled_positions_of,
    positions_of,
    text_bytes_of,
    tokens_of,
    unpack_soft,
)
from pipeline.cache.format.rows import gather, rows_of
from pipeline.errors import ContractError
from pipeline.models import LoadedModel, longest_input, pad_id, tokenizer_info
from pipeline.records import (
    NO_LABEL,
    BadRow,
    CachedExample,
    Contract,
    Example,
    Full,
    PositionWeights,
    RowBlock,
    Sampled,
    Scale,
    Score,
    Segment,
    Spans,
    StudentBatch,
    Target,
    TokenBlock,
    Tokenization,
    TokenizedExample,
    VocabularyMap,
    offsets_of_counts,
)
from pipeline.softlabels import most_likely, target
from pipeline.softlabels.mapped import at_positions, map_classes, map_target
from pipeline.tasks import Task


@dataclass(frozen=True, slots=True)
class Picked:
    """The rows of one batch before collation."""

    parts: tuple[Sequence[Segment], ...]
    """The rows of each cache: one, or one per teacher."""
    counts: np.ndarray
    """(B,) bool: whether the row counts."""

    def __len__(self) -> int:
        return len(self.counts)

    def __iter__(self) -> Iterator[tuple[CachedExample, bool]]:
        rows = [row for segment in self.parts[0] for row in rows_of(gather([segment]))]
        return zip(rows, self.counts.tolist(), strict=True)


@dataclass(frozen=True)
class TrainingRows(Dataset[tuple[CachedExample, bool]]):
    """Rows of a cache with a flag whether each counts; index `~i` is row i with weight 0.

    See `BatchOrder`.
    """

    dataset: CacheDataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[CachedExample, bool]:
        return self.dataset[index if index >= 0 else ~index], index >= 0

    def __getitems__(self, indices: Sequence[int]) -> Picked:
        """Return the rows of a batch; called by `torch.utils.data.DataLoader`."""
        numbers = np.asarray(indices, dtype=np.int64)
        counts = numbers >= 0
        found: Any = self.dataset.segments(np.where(counts, numbers, ~numbers))
        return Picked(found if isinstance(found, tuple) else (found,), counts)


@dataclass(frozen=True, slots=True)
class Collator:
    """Collates rows into batches of inputs, hard labels and the teacher's distribution."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    temperature: float
    tail: str = "ghost"
    retokenize: Tokenization | None = None
    """Settings to tokenize the stored text with the student's tokenizer; None: the cache's tokens
    are used."""
    teacher_labels: bool = False
    """Use the teacher's most likely class as the hard label."""
    position_weights: PositionWeights = "equal"
    pad_id: int | None = None
    """Token id for padding; None: the tokenizer's."""
    for_evaluation: bool = False
    """Add the fields that only evaluations need, such as the teacher's predictions."""
    vocabulary_map: VocabularyMap | None = None
    """Maps the teacher's vocabulary to that of a student with another tokenizer."""
    with_spans: bool = False
    """Add the aligned spans: texts whose ends are token boundaries for both tokenizers."""
    scale: Scale | None = None
    """Mean and standard deviation of the cache's scores; None: it has none."""
    by_list: bool = False
    """For rankings: the soft term is a mean over lists with equal weights."""

    def __call__(self, rows: Picked) -> dict[str, Any]:
        """Collate a batch into nested tensors; called by `torch.utils.data.DataLoader`."""
        return to_tensors(self.collate(rows))

    def collate(self, rows: Picked) -> StudentBatch:
        """Collate B rows of one cache."""
        return self.collate_block(gather(rows.parts[0], names=self.columns), rows.counts)

    @property
    def columns(self) -> Container[str]:
        """The columns that batches are made of."""
        spans = _SPANS if self.with_spans else frozenset[str]()
        return (
            COLLATED | spans
            if self.retokenize is None
            else COLLATED | {"text", "text_pair", "position_words", "choice_texts"}
        )

    def collate_block(self, block: RowBlock, counts: np.ndarray | None = None) -> StudentBatch:
        """Collate a block of B rows.

        Args:
            counts: (B,) bool: whether each row counts; None: all do.
        """
        tokens = tokens_of(block)
        given: TokenBlock | Sequence[TokenizedExample] = tokens
        if self.retokenize is not None and self.task.reads != "images":
            given = _tokenize_anew(self.task, block, self.tokenizer, self.retokenize)
        filler = pad_id(self.tokenizer) if self.pad_id is None else self.pad_id
        inputs, supervised = self.task.collate(given, filler, processor=self.tokenizer)
        soft = unpack_soft(block)
        entropy = None if isinstance(soft.encoding, Full | Score) else _entropy(block, labelled_positions_of(block))
        goal = target(soft, self.temperature, tail=self.tail, entropy=entropy)
        if self.scale is not None:
            goal = dataclasses.replace(goal, unit=torch.from_numpy(np.tile(self.scale.std, len(block))))
        lists = _lists(block, counts)
        if lists is not None:
            goal = dataclasses.replace(goal, group=lists)
        counted = self._position_weights(-goal.negative_entropy if entropy is None else entropy, goal)
        predicted = most_likely(soft)[0] if self.for_evaluation or self.teacher_labels else None
        if lists is not None and self.by_list:
            counted = counted * _shares(lists)
        if self.vocabulary_map is not None:
            where = aligned_positions(block)
            goal = map_target(goal, where, self.vocabulary_map, is_sample=isinstance(soft.encoding, Sampled))
            counted = at_positions(counted, where, 0.0)
            predicted = None if predicted is None else map_classes(predicted, where, self.vocabulary_map)
        flags = np.ones(len(block), dtype=bool) if counts is None else counts
        weights = torch.from_numpy(np.repeat(flags.astype(np.float32), positions_of(block)))
        labels = torch.from_numpy(self.task.hard_labels(tokens)) if not self.teacher_labels else predicted
        assert labels is not None
        return StudentBatch(
            inputs=inputs,
            supervised=supervised,
            labels=labels.masked_fill(weights == 0, math.nan if labels.is_floating_point() else NO_LABEL),
            target=goal,
            weights=weights,
            soft_weights=weights * counted,
            source_rows=torch.from_numpy(block.numbers["source_row"].astype(np.int64)),
            teacher_predicted=predicted if self.for_evaluation else None,
            text_bytes=torch.from_numpy(text_bytes_of(block) * flags) if self.for_evaluation else None,
            num_positions=torch.from_numpy(positions_of(block).astype(np.int64)) if self.for_evaluation else None,
            spans=_spans(block, flags) if self.with_spans else None,
        )

    def _position_weights(self, entropy: Tensor, goal: Target) -> Tensor:
        """Return (N,) weights in [0, 1] from the teacher's entropy as a share of its maximum."""
        if self.position_weights == "equal":
            return torch.ones_like(entropy)
        share = (entropy / math.log(goal.num_classes)).clamp(0, 1)
        return share if self.position_weights == "uncertainty" else 1 - share


def _lists(block: RowBlock, counts: np.ndarray | None) -> Tensor | None:
    """Return (R,) int64: the list of each row, or None if rows are not ranked.

    A row that does not count gets a list of its own.
    """
    found = block.numbers.get("score_group")
    if found is None:
        return None
    runs = np.cumsum(np.append(0, found[1:] != found[:-1]))
    _, first, of = np.unique(found, return_index=True, return_inverse=True)
    # Equal ids that are not adjacent are lists of different caches or splits.
    lists = np.where(runs == runs[first][of], found.astype(np.int64), -(1 << 40) - runs)
    alone = -1 - np.arange(len(block))
    return torch.from_numpy(lists if counts is None else np.where(counts, lists, alone))


def _shares(lists: Tensor) -> Tensor:
    """(R,) lists -> (R,) float: 1 / the rows of the list in this batch; 0 for lists of one row."""
    _, number, sizes = torch.unique(lists, return_inverse=True, return_counts=True)
    size = sizes[number]
    return torch.where(size > 1, 1.0 / size, 0.0)


#: Columns that batches are made of: all but those that identify a row, hold its texts, or come from
#: the source.
COLLATED = (COLUMNS | {TEACHER_POSITION}) - {
    "piece",
    "content_hash",
    "text",
    "text_pair",
    "messages",
    "position_words",
    "choice_texts",
    "teacher_nll_sum",
    LABEL_LOGPROBS,
}


_SPANS = frozenset(["span", "span_start", "span_stop", LABEL_LOGPROBS])


def _spans(block: RowBlock, flags: np.ndarray) -> Spans:
    """Return the aligned spans of all rows; spans of rows that do not count have weight 0."""
    owner, first, last = (block.lists[name] for name in ("span", "span_start", "span_stop"))
    logprobs = block.lists[LABEL_LOGPROBS]
    finite = np.maximum(logprobs.values.astype(np.float64), np.finfo(np.float16).min)
    upto = np.append(0.0, np.cumsum(finite))
    before = np.repeat(logprobs.offsets[:-1], first.counts)
    numbers = np.where(owner.values < 0, -1, owner.values + np.repeat(first.offsets[:-1], owner.counts))
    return Spans(
        owner=torch.from_numpy(numbers.astype(np.int64)),
        teacher_logprobs=torch.from_numpy(
            (upto[last.values + before] - upto[first.values + before]).astype(np.float32)
        ),
        weights=torch.from_numpy(np.repeat(flags.astype(np.float32), first.counts)),
    )


def aligned_positions(block: RowBlock) -> Tensor:
    """Return (N,) int64: the teacher's position that each student position is aligned with.

    It is an index into all of the teacher's positions in the block, or -1 for none.
    """
    where = block.lists[TEACHER_POSITION]
    before = offsets_of_counts(labelled_positions_of(block))[:-1]
    return torch.from_numpy(np.where(where.values < 0, -1, where.values + np.repeat(before, where.counts)))


def _entropy(block: RowBlock, positions: np.ndarray) -> Tensor:
    """Return (N,) nats: the teacher's entropy at each position, or the mean of its row.

    The mean is used if only the sum over the row is stored.
    """
    if "entropy" in block.lists:
        return torch.from_numpy(block.lists["entropy"].values.astype(np.float32))
    means = block.numbers["teacher_entropy_sum"].astype(np.float64) / np.maximum(positions, 1)
    return torch.from_numpy(
        np.repeat(np.nan_to_num(means).astype(np.float32), positions)
    )  # nan (unknown) becomes 0: the KL is then correct up to a constant


def to_tensors(batch: StudentBatch) -> dict[str, Any]:
    """Return the batch as nested mappings of tensors, which Trainer and accelerate can move."""
    goal = batch.target
    tensors: dict[str, Any] = {
        "inputs": batch.inputs,
        "labels": batch.labels,
        "weights": batch.weights,
        "soft_weights": batch.soft_weights,
        "source_rows": batch.source_rows,
        "target": {
            "offsets": goal.offsets,
            "ids": goal.ids,
            "weights": goal.weights,
            "negative_entropy": goal.negative_entropy,
        },
    }
    for name in ("supervised", "teacher_predicted", "text_bytes", "num_positions"):
        if getattr(batch, name) is not None:
            tensors[name] = getattr(batch, name)
    for name in ("log_residual", "unit", "group"):
        if getattr(goal, name) is not None:
            tensors["target"][name] = getattr(goal, name)
    if batch.spans is not None:
        tensors["spans"] = {name: getattr(batch.spans, name) for name in ("owner", "teacher_logprobs", "weights")}
    return tensors


def from_tensors(tensors: Mapping[str, Any], num_classes: int) -> StudentBatch:
    """The inverse of `to_tensors`."""
    parts = {"supervised": None, **tensors, "target": target_from_tensors(tensors["target"], num_classes)}
    if "spans" in tensors:
        parts["spans"] = Spans(**tensors["spans"])
    return StudentBatch(**parts)


def target_from_tensors(tensors: Mapping[str, Tensor], num_classes: int) -> Target:
    """Return the target from its part of the nested tensors."""
    parts = dict(tensors)
    return Target(num_classes=num_classes, log_residual=parts.pop("log_residual", None), **parts)


def longest_row(task: Task, contract: Contract, student: LoadedModel) -> int:
    """Return the number of tokens of the student's longest row.

    It is that of the cache, within what the student accepts. A student with another tokenizer on a
    task of words may need more tokens per word, so it gets up to `_MOST_TOKENS_FOR_ONE` times as
    many.
    """
    longest = longest_input(student.model, student.tokenizer)
    cached = contract.tokenization.max_length
    if task.other_tokenizers == "words" and tokenizer_info(student.tokenizer).sha256 != contract.tokenizer.sha256:
        return min(longest, _MOST_TOKENS_FOR_ONE * cached)
    return min(cached, longest)


def of_student(contract: Contract, max_length: int | None) -> Tokenization:
    """Return the settings that tokenize stored texts for a student with another tokenizer.

    Args:
        max_length: tokens of its longest row; None: that of the cache.
    """
    return Tokenization(max_length or contract.tokenization.max_length, num_choices=contract.tokenization.num_choices)


#: Upper bound on the student's tokens per token of the teacher.
_MOST_TOKENS_FOR_ONE = 8


def _tokenize_anew(
    task: Task, block: RowBlock, tokenizer: PreTrainedTokenizerBase, settings: Tokenization
) -> list[TokenizedExample]:
    none = [None] * len(block)
    texts, pairs, words, choices = (
        block.others[name].to_pylist() if name in block.others else none
        for name in ("text", "text_pair", "position_words", "choice_texts")
    )
    examples = [
        Example(i, text, pair, words=None if row is None else tuple(row), choices=None if some is None else tuple(some))
        for i, (text, pair, row, some) in enumerate(zip(texts, pairs, words, choices, strict=True))
    ]
    tokenized = list(task.tokenize(examples, "", tokenizer, settings))
    rows = [item for item in tokenized if isinstance(item, TokenizedExample)]
    if task.marks_positions:
        _check_whole(block, tokenized)
        _check_positions(block, rows, settings)
    return rows


def _check_whole(block: RowBlock, tokenized: Sequence[TokenizedExample | BadRow]) -> None:
    """Raise `ContractError` if the student's tokenizer makes no tokens of a row."""
    bad = next((item for item in tokenized if isinstance(item, BadRow)), None)
    if bad is not None:
        raise ContractError(
            f"source row {block.numbers['source_row'][bad.source_row]}: the student's tokenizer cannot read the row: {bad.reason}; "
            'remove such rows with "softlabel filter", or choose another student'
        )


def _check_positions(block: RowBlock, rows: Sequence[TokenizedExample], settings: Tokenization) -> None:
    """Raise `ContractError` if a row in the student's tokens lacks words with teacher labels."""
    expected = positions_of(block)
    found = np.array([row.num_positions for row in rows])
    if not np.array_equal(found, expected):
        row = int(np.flatnonzero(found != expected)[0])
        raise ContractError(
            f"source row {block.numbers['source_row'][row]}: {expected[row]} words are labelled, and {found[row]} of them are within the {settings.max_length} tokens that the "
            "student takes; cache again with a smaller --max-length"
        )
