"""Rows labelled by another program, checked against each other and against the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import BadRowError
from pipeline.records import (
    NO_LABEL,
    Contract,
    Encoding,
    Image,
    Sampled,
    Scalar,
    Score,
    SoftLabels,
    TeacherScores,
    TokenizedExample,
    is_known,
)
from pipeline.softlabels.ragged import owners
from pipeline.sources.inputs.words import read_words
from pipeline.sources.scores import group_id
from pipeline.tasks import Task, get_task, token_block
from pipeline.tasks.answers.candidates import own_logits
from pipeline.tasks.images.pixels import decode


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A tokenized row or image with the teacher's output: logits or encoded soft labels."""

    input_ids: Sequence[int] | np.ndarray = ()
    logits: Tensor | np.ndarray | None = None
    """(N, V) float; row n is for supervised position n. Multiple choice also accepts (1, C) for the
    C choices of the row."""
    soft_labels: SoftLabels | None = None
    """N positions; give `scores` too if they are known."""
    scores: TeacherScores | None = None
    supervised: Sequence[bool] | np.ndarray | None = None
    """(T,) bool, token tasks. Default: all positions; for language models, all but the last."""
    label: int | None = None
    labels: Sequence[int] | Sequence[float] | np.ndarray | None = None
    """(N,). Token classification and multi-label classification: one class id per position, -100
    for no label. Score tasks: one score per output, nan for no score. Default: no labels."""
    group: int | str | None = None
    """Rankings: identifies the list of the row. The rows of one list must be consecutive."""
    words: Sequence[str] | None = None
    """(N,) token classification: the word of each position; stored with `store_text`."""
    text: str | None = None
    text_pair: str | None = None
    messages: str | None = None
    """Chats, instead of `text`: the JSON string of `TokenizedExample.messages`."""
    image: bytes | None = None
    """Image classification, instead of `input_ids`: the bytes of a PNG, JPEG or other image
    file."""
    choice_lengths: Sequence[int] | np.ndarray | None = None
    """Multiple choice: number of `input_ids` of each choice; `input_ids` concatenates the
    choices."""
    token_type_ids: Sequence[int] | np.ndarray | None = None
    text_bytes: int = 0
    split: str = "train"
    kept: Mapping[str, Scalar] = field(default_factory=dict)
    """Columns to copy into the cache, as text. The first row decides which columns are copied."""


def tokenized(task: Task, row: LabelledRow, number: int, num_names: int) -> TokenizedExample:
    """Convert a labelled row to a `TokenizedExample`, without its soft labels.

    Args:
        number: source row number.
        num_names: number of label names of the cache.

    Raises:
        BadRowError: the flags, labels, words, choice lengths or image do not fit the row.
    """
    ids = np.asarray(row.input_ids, dtype=np.int32)
    supervised = labels = None
    if task.reads == "images":
        _check_image(row, number)
    elif row.image is not None:
        raise BadRowError(f"row {number}: image: rows of {task.name} have input_ids")
    if task.marks_positions:
        default = task.default_positions(ids)
        supervised = default if row.supervised is None else np.asarray(row.supervised, dtype=bool)
        last = task.label_source == "tokens"
        if len(supervised) != len(ids) or not supervised.any() or (last and supervised[-1]):
            raise BadRowError(
                f"row {number}: supervised: expected {len(ids)} flags, one or more of them set{' and the last not' if last else ''}"
            )
    if task.label_source in ("positions", "hidden", "target"):
        labels = _labels_of(task, row, number, num_names if supervised is None else int(supervised.sum()))
    if task.label_source == "target" and supervised is not None:
        labels = _target_of(row, number, ids, supervised)
    return TokenizedExample(
        source_row=number,
        piece=0,
        input_ids=ids,
        supervised=supervised,
        token_type_ids=None if row.token_type_ids is None else np.asarray(row.token_type_ids, dtype=np.int32),
        label=row.label,
        labels=labels,
        words=None if row.words is None else tuple(row.words),
        group=None if row.group is None else group_id(row.group),
        text=row.text,
        text_pair=row.text_pair,
        messages=row.messages,
        document_lengths=_lengths_of(row, number, ids, num_names) if task.reads == "choices" else None,
        image=None if row.image is None else Image(row.image),
        text_bytes=row.text_bytes,
        kept={name: value if value is None else str(value) for name, value in row.kept.items()},
    )


def _check_image(row: LabelledRow, number: int) -> None:
    """Raise `BadRowError` unless the row has an image that can be decoded, and no tokens."""
    if not isinstance(row.image, bytes) or len(row.input_ids):
        raise BadRowError(
            f"row {number}: image: expected the bytes of a PNG, JPEG or other file, and no input_ids, found {type(row.image).__name__}"
        )
    try:
        decode(row.image)
    except BadRowError as error:
        raise BadRowError(f"row {number}: image: {error}") from None


def _lengths_of(row: LabelledRow, number: int, ids: np.ndarray, most: int) -> np.ndarray:
    """Return the (most,) int32 number of tokens of each choice, 0 for choices the row lacks.

    Raises:
        BadRowError: the lengths do not fit the tokens.
    """
    lengths = np.asarray(() if row.choice_lengths is None else row.choice_lengths)
    fits = lengths.ndim == 1 and 2 <= len(lengths) <= most and lengths.dtype.kind in "iu" and int(lengths.min()) >= 2
    if not fits or int(lengths.sum()) != len(ids):
        raise BadRowError(
            f"row {number}: choice_lengths: expected 2 to {most} lengths of at least 2 that sum to {len(ids)}, found {str(row.choice_lengths)[:80]}"
        )
    return np.pad(lengths, (0, most - len(lengths))).astype(np.int32)


def _scores_of(row: LabelledRow, number: int, count: int) -> np.ndarray:
    """Return the (count,) float32 scores of a row, nan where a score is missing.

    Raises:
        BadRowError: the labels are not numbers, or not one per output.
    """
    labels = np.full(count, np.nan) if row.labels is None else np.asarray(row.labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iuf":
        raise BadRowError(f"row {number}: labels: expected scores, found {str(row.labels)[:80]}")
    if len(labels) != count:
        raise BadRowError(f"row {number}: labels: expected {count}, one for each output, found {len(labels)}")
    return labels.astype(np.float32)


def _labels_of(task: Task, row: LabelledRow, number: int, count: int) -> np.ndarray:
    """Return the (count,) labels of a row, int32 or float32 for scores, and check its words.

    Raises:
        BadRowError: not one label or word per position, labels that are not class ids, or words
            that are not text.
    """
    if task.target == "score":
        return _scores_of(row, number, count)
    labels = np.full(count, NO_LABEL) if row.labels is None else np.asarray(row.labels)
    whole = labels.ndim == 1 and (labels.dtype.kind in "iu" or not len(labels))
    if not whole or np.abs(labels.astype(np.float64)).max(initial=0) > np.iinfo(np.int32).max:
        raise BadRowError(f"row {number}: labels: expected class ids, found {str(row.labels)[:80]}")
    if row.words is not None:
        read_words(f"row {number}: words", row.words if isinstance(row.words, str) else list(row.words))
    for name, found in (("labels", len(labels)), ("words", count if row.words is None else len(row.words))):
        if found != count:
            raise BadRowError(f"row {number}: {name}: expected {count}, one a supervised position, found {found}")
    return labels.astype(np.int32)


def _target_of(row: LabelledRow, number: int, ids: np.ndarray, supervised: np.ndarray) -> np.ndarray:
    """Return the (N,) int32 target tokens, which are the last tokens of the row.

    Raises:
        BadRowError: no source tokens precede the target, or the labels differ from the target.
    """
    first = int(supervised.argmax())
    if not first or not supervised[first:].all():
        raise BadRowError(
            f"row {number}: supervised: expected the tokens of the target, behind one or more of the source"
        )
    if row.labels is not None and not np.array_equal(np.asarray(row.labels), ids[first:]):
        raise BadRowError(
            f"row {number}: labels: expected the tokens of the target, {ids[first:][:8].tolist()}, found {str(row.labels)[:80]}; leave them out"
        )
    return ids[first:]


def check_ids(task: Task, examples: Sequence[TokenizedExample], contract: Contract) -> None:
    """Check that token ids and hard labels lie within the contract's vocabulary and classes.

    Raises:
        BadRowError: an id or a label is out of range.
    """
    number = examples[0].source_row
    tokens = token_block(examples)
    ids, limit = tokens.input_ids, contract.tokenizer.vocabulary_size
    fine = task.reads == "images" or (bool(ids.counts.all()) and ids.values.min() >= 0 and ids.values.max() < limit)
    _check(number, fine, f"token ids of 0 to {limit - 1}", ids.values[:8].tolist())
    labels = task.hard_labels(tokens)
    known = labels[is_known(labels)]
    if task.target == "score":
        _check(number, bool(np.isfinite(known).all()), "finite labels", known[:8].tolist())
        return
    fine = not len(known) or (known.min() >= 0 and known.max() < contract.num_classes)
    _check(number, fine, f"labels of 0 to {contract.num_classes - 1}", known[:8].tolist())


def logits_of(row: LabelledRow, example: TokenizedExample, contract: Contract) -> Tensor:
    """Return the (N, V) logits of a row, without padded classes.

    Raises:
        BadRowError: the logits do not have the shape that the contract expects.
    """
    logits = torch.as_tensor(row.logits).detach().cpu()
    _check(example.source_row, logits.dim() == 2, "logits of two dimensions, (N, V)", tuple(logits.shape))
    if logits.shape[1] > contract.num_classes:
        logits = logits[:, : contract.num_classes]
    own = _num_own(example, contract)
    if own is not None and logits.shape[-1] in (own, contract.num_classes):
        logits = own_logits(logits, torch.arange(contract.num_classes) < own)
    shape = (example.num_positions, contract.num_classes)
    if logits.shape != shape:
        _check(example.source_row, False, f"logits of shape {shape}", tuple(logits.shape))
    return logits


def _num_own(example: TokenizedExample, contract: Contract) -> int | None:
    """Return the number of classes of this row: its choices, or the places of its tokens.

    None: every row has all classes.
    """
    names = get_task(contract.task).names
    if names == "choices" and example.document_lengths is not None:
        return int((example.document_lengths > 0).sum())
    return len(example.input_ids) if names == "places" else None


def ready_of(row: LabelledRow, example: TokenizedExample, contract: Contract) -> SoftLabels:
    """Return the row's own soft labels after checking them against the contract.

    Raises:
        BadRowError: no soft labels, or another number of positions, encoding or number of classes.
    """
    soft, number = row.soft_labels, example.source_row
    if soft is None:
        raise BadRowError(f"row {number}: expected logits or soft_labels, found neither")
    positions = example.num_positions
    _check(number, len(soft) == positions, f"soft labels of {positions} positions", len(soft))
    _check(number, soft.encoding == contract.encoding, str(contract.encoding), soft.encoding)
    _check(number, soft.num_classes == contract.num_classes, f"{contract.num_classes} classes", soft.num_classes)
    return soft


def scores_of(rows: Sequence[LabelledRow], soft: SoftLabels, labels: Tensor, counts: Sequence[int]) -> TeacherScores:
    """Return the teacher scores of a batch: as given, else computed from the kept classes.

    Computed from kept classes, `nll` is nan where the hard label is not among them, and `entropy`
    is nan. For `Score` encodings, `nll` is the squared error of each output.
    """
    if isinstance(soft.encoding, Score):
        errors = (soft.top_logprobs - labels).square().nan_to_num(nan=0.0)
        return TeacherScores(errors, torch.zeros_like(errors))
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


def label_logprobs(
    rows: Sequence[LabelledRow], examples: Sequence[TokenizedExample], scores: TeacherScores, encoding: Encoding
) -> Tensor:
    """Return the (N,) float32 log-probability of the token after each position, in nats, T = 1.

    Raises:
        BadRowError: it is unknown at some position; the message names the first row of the batch.
    """
    nll = scores.nll.float().clone()
    if isinstance(encoding, Sampled):  # kept weights are rounded, at their own temperature
        of_row = torch.tensor([example.num_positions for example in examples])
        unknown = torch.tensor([row.logits is None and row.scores is None for row in rows])
        nll[unknown.repeat_interleave(of_row)] = torch.nan
    if bool(nll.isnan().any()):
        raise BadRowError(
            f"row {examples[0].source_row}: label_logprobs: the log-probability of the token that follows is not known at {int(nll.isnan().sum())} of {len(nll)} positions, "
            "where it is not among the classes given; leave out --store-label-logprobs, or set such rows aside with --on-bad-row skip"
        )
    return -nll


def _check(number: int, condition: bool, expected: str, found: object) -> None:
    if not condition:
        raise BadRowError(f"row {number}: expected {expected}, found {found}")
