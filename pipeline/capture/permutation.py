"""Check that the data's class order matches the teacher's, on a sample of labelled rows.

The check runs before anything is written. Numeric labels are matched to classes by position. If two
conventions differ (1 = sport, 1 = business), the hard labels are wrong without an error. A
different order that fits the teacher's predictions far better indicates such a mismatch.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.capture.plan import plan_batches
from pipeline.capture.teachers.predictions import most_likely
from pipeline.capture.teachers.protocol import Teacher
from pipeline.errors import SourceError
from pipeline.metrics import share_interval
from pipeline.progress import Progress
from pipeline.records import NO_LABEL, Encoding, Tokenization, TokenizedExample
from pipeline.softlabels import counter_uniforms
from pipeline.sources import LabelMap, Source, read_examples
from pipeline.sources.batches import read_rows
from pipeline.sources.labels import fold
from pipeline.tasks import Task

logger = logging.getLogger(__name__)

#: Size of the sample: 1/20 of the source rows, within these bounds.
_LEAST, _MOST, _SHARE = 128, 512, 20
#: Number of rows that a judge is tried on.
_TRIED = 200
#: For sources that are read by row group.
_MOST_ROW_GROUPS = 16
#: Probability of a false refusal over all tested cycles.
_ALPHA = 1e-3
#: Least signal of a class for a label: the share of the label's rows that are predicted as the
#: class, minus that share among the rows of other labels.
_LEAST_SIGNAL = 0.5
#: Least gain of this signal over the signal of the label's own class.
_LEAST_GAIN = 0.5
#: Labels with fewer sampled rows are left out; they give no evidence.
_LEAST_ROWS = 2


def check_class_order(
    task: Task,
    source: Source,
    labels: LabelMap | None,
    teacher: Teacher,
    encoding: Encoding,
    tokenization: Tokenization,
    ranges: Mapping[str, tuple[int, int]],
    batch_tokens: int,
    *,
    append: bool = False,
) -> None:
    """Refuse hard labels that fit the teacher far better in another order of the classes.

    Args:
        labels: matched without a label map; with one, the user has stated the order. None: the
            classes are tokens, so there is nothing to compare.
        ranges: the rows `[start, stop)` of each split that are read.
        append: the rows are appended to a finished cache, whose contract cannot get a label map.

    Raises:
        SourceError: the order differs; the message has the labels and the right `--label-map`. Or a
            label is not a class.
    """
    if task.names != "classes":  # multi-label classes and answers have no order to compare
        return
    rows = [] if labels is None else _labelled(source, labels, ranges)
    if labels is None or len({row.label for row in rows}) < 2:
        return
    sample = _sample(rows, min(_MOST, max(_LEAST, sum(stop - start for start, stop in ranges.values()) // _SHARE)))
    examples = _read(task, source, labels, teacher.tokenizer, tokenization, sample)
    found = _predict(task, teacher, examples, encoding, batch_tokens) if examples else None
    if found is not None:
        _refuse_other_order(source, labels, rows, *found, teacher.num_classes, ranges, append=append)


def try_judge(
    task: Task,
    source: Source,
    labels: LabelMap | None,
    teacher: Teacher,
    encoding: Encoding,
    tokenization: Tokenization,
    ranges: Mapping[str, tuple[int, int]],
    batch_tokens: int,
    *,
    compare_order: bool,
) -> None:
    """Log the accuracy of a prompted teacher on labelled rows of all splits except test.

    Args:
        labels, ranges: as in `check_class_order`.
        compare_order: also check the order of the classes on these rows, if the data's labels are
            not the class names.

    Raises:
        SourceError: as in `check_class_order`.
    """
    rows = [] if labels is None else _labelled(source, labels, ranges)
    known = [row for row in rows if not row.split.startswith("test")]
    examples = [] if labels is None else _read(task, source, labels, teacher.tokenizer, tokenization, known[:_TRIED])
    if labels is None or not examples:
        logger.info("%s: no labelled rows to measure the teacher on (rows of test are not used)", source.name)
        return
    with Progress("trial of the teacher", len(examples)) as progress:
        found = _predict(task, teacher, examples, encoding, batch_tokens, progress)
    if found is None:
        return
    truth, predicted = found
    right, count = int((truth == predicted).sum()), len(truth)
    interval = share_interval(right, count)
    shares, answers = (np.bincount(ids, minlength=teacher.num_classes) / count for ids in (truth, predicted))
    common, usual = int(shares.argmax()), int(answers.argmax())
    text = (
        f"{teacher.name}: labels {right / count:.1%} of {count} labelled rows of {', '.join(dict.fromkeys(row.split for row in known[:_TRIED]))} right "
        f"(95% interval {interval.low:.1%} to {interval.high:.1%}); always {labels.class_name(common)!r} would be right on {shares[common]:.1%}; "
        f"its most frequent answer is {labels.class_name(usual)!r}, on {answers[usual]:.1%}"
    )
    if interval.low > shares[common]:
        logger.info("%s", text)
    else:
        logger.warning(
            "%s: this is not shown to be better than that one answer, and students of it would be no better; try --calibrate, --shots %d, "
            "other --label-text, another --prompt-template, or a larger model",
            *(text, 2 * teacher.num_classes),
        )
    by_number = any(fold(row.shown) != fold(labels.class_name(row.label)) for row in rows)
    if compare_order and by_number and len({row.label for row in rows}) > 1:
        _refuse_other_order(source, labels, rows, truth, predicted, teacher.num_classes, ranges, append=False)


def _predict(
    task: Task,
    teacher: Teacher,
    examples: Sequence[TokenizedExample],
    encoding: Encoding,
    batch_tokens: int,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the (N,) labels and (N,) most likely classes of labelled rows.

    None: out of memory; the capture itself then raises an error that states the remedy.
    """
    stops = np.cumsum([example.num_positions for example in examples])
    predicted = np.zeros(int(stops[-1]), dtype=np.int64)
    try:
        for members, length in plan_batches([example.num_tokens for example in examples], batch_tokens):
            batch = [examples[i] for i in members]
            places = [np.arange(stops[i] - examples[i].num_positions, stops[i]) for i in members]
            predicted[np.concatenate(places)] = most_likely(teacher.begin(batch, length, encoding).result())
            if progress is not None:
                progress.update(len(batch), tokens=sum(example.num_tokens for example in batch))
    except torch.OutOfMemoryError:
        return None
    truth = task.hard_labels(examples)
    return truth[truth != NO_LABEL], predicted[truth != NO_LABEL]


def _refuse_other_order(
    source: Source,
    labels: LabelMap,
    rows: Sequence[_Row],
    truth: np.ndarray,
    predicted: np.ndarray,
    num_classes: int,
    ranges: Mapping[str, tuple[int, int]],
    *,
    append: bool,
) -> None:
    moved = better_order(truth, predicted, num_classes)
    if not moved:
        return
    shown = {row.label: row.shown for row in reversed(rows)}
    touched = np.isin(truth, list(moved))
    ours = float((predicted[touched] == truth[touched]).mean())
    theirs = float((predicted[touched] == np.array([moved[int(label)] for label in truth[touched]])).mean())
    pairs = ", ".join(
        f"{shown[label]!r} is {labels.class_name(to)!r}, not {labels.class_name(label)!r}"
        for label, to in list(moved.items())[:8]
    )
    flags = " ".join(
        "--label-map " + shlex.quote(f"{shown[label]}={labels.class_name(to)}") for label, to in moved.items()
    )
    label = next(iter(moved))
    as_it_is = f"--label-map {shlex.quote(f'{shown[label]}={labels.class_name(label)}')}"
    start = min(start for start, _ in ranges.values())
    whose, mend = (
        (
            f"--append: the classes of the new rows (from row {start} on)",
            f"cache these alone, with --rows {start}: and {flags}, into another --output, then join the two with softlabel merge",
        )
        if append
        else ("the data's classes", f"add {flags}")
    )
    raise SourceError(
        f"{source.name}: {whose} are in another order than the teacher's: of {int(touched.sum())} {'words' if source.columns.words else 'rows'} it predicts the label of {ours:.0%}, and of {theirs:.0%} "
        f"where {pairs}{', ...' if len(moved) > 8 else ''}; {mend} (or, if the labels are right as they are, {as_it_is})"
    )


def better_order(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> dict[int, int]:
    """Return the labels that belong to other classes, where this is beyond chance.

    Args:
        truth, predicted: (N,) int64 labels and the teacher's argmax, in an order that is
            independent of their values.

    Returns:
        Label -> class for the labels that move. Empty if the given order fits, or if the teacher or
            the labels are too bad to tell.

    The best assignment is chosen on one half of the rows: a linear assignment on `_signals`, so
    that a class that is predicted everywhere has no signal. It is tested on the other half, so that
    the choice among K! orders does not bias the test. A cycle of it is accepted if an exact paired
    sign test rejects "as often right as before" at `_ALPHA` / number of cycles, if its signals pass
    a test against independence, and if they are strong: a bad teacher may favour a wrong class
    slightly but significantly.
    """
    halves = _halves(truth)
    chosen = _assignment(_signals(truth[halves == 0], predicted[halves == 0], num_classes))
    truth, predicted = truth[halves == 1], predicted[halves == 1]
    signals = _signals(truth, predicted, num_classes)
    present = np.bincount(truth, minlength=num_classes) >= _LEAST_ROWS
    cycles = [there for cycle in _cycles(chosen) if (there := [label for label in cycle if present[label]])]
    found: dict[int, int] = {}
    for cycle in cycles:
        after = np.array([signals[label, chosen[label]] for label in cycle])
        before = np.array([signals[label, label] for label in cycle])
        if after.mean() < _LEAST_SIGNAL or after.min() <= 0 or (after - before).mean() < _LEAST_GAIN:
            continue
        rows = np.isin(truth, cycle)
        targets = np.array([chosen[label] for label in truth[rows].tolist()])
        gained = int(((predicted[rows] == targets) & (predicted[rows] != truth[rows])).sum())
        lost = int(((predicted[rows] == truth[rows]) & (predicted[rows] != targets)).sum())
        if _sign_test(gained, lost) > _ALPHA / len(cycles):
            continue
        if _independent([_z(truth, predicted, label, chosen[label]) for label in cycle]) <= _ALPHA:
            found.update((label, chosen[label]) for label in cycle)
    return dict(sorted(found.items()))


def _independent(scores: Sequence[float]) -> float:
    """Return P(z scores as large as these) if predictions do not depend on labels (Stouffer)."""
    return math.erfc(sum(scores) / math.sqrt(2 * len(scores))) / 2


def _z(truth: np.ndarray, predicted: np.ndarray, label: int, to: int) -> float:
    """Return the pooled two-proportion z score of class `to` for a label against the others."""
    ours, hit = truth == label, predicted == to
    n, m = int(ours.sum()), int((~ours).sum())
    share = float(hit.mean())
    if not n or not m or share in (0.0, 1.0):
        return 0.0
    return float(hit[ours].mean() - hit[~ours].mean()) / math.sqrt(share * (1 - share) * (1 / n + 1 / m))


def _sign_test(gained: int, lost: int) -> float:
    """Return P(at least `gained` of all changes are gains) if gains and losses are as likely."""
    changed = gained + lost
    ways = sum(math.comb(changed, i) for i in range(gained, changed + 1))
    return float(ways / 2**changed)


def _signals(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return (V, V): how much more often class j is predicted for label i than for other labels.

    Each of the other labels has the same weight. Labels with too few rows are 0.
    """
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (truth, predicted), 1)
    rows = counts.sum(1)
    enough = rows >= _LEAST_ROWS
    shares = np.where(enough[:, None], counts / np.maximum(rows, 1)[:, None], 0.0)
    others = (shares.sum(0) - shares) / max(int(enough.sum()) - 1, 1)
    signals: np.ndarray = np.where(enough[:, None], shares - others, 0.0)
    return signals


def _assignment(signals: np.ndarray) -> list[int]:
    """Return the best one-to-one map label -> class; among ties, the one that moves least."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(signals + 1e-6 * np.eye(len(signals)), maximize=True)
    return [int(column) for column in columns]


def _cycles(order: Sequence[int]) -> list[list[int]]:
    """Return the labels that move, one list per cycle."""
    seen: set[int] = set()
    found = []
    for start in range(len(order)):
        cycle = []
        while start not in seen:
            seen.add(start)
            cycle.append(start)
            start = order[start]
        if len(cycle) > 1:
            found.append(cycle)
    return found


def _halves(truth: np.ndarray) -> np.ndarray:
    """Return (N,) int64: 0 and 1 alternating within each label."""
    halves = np.zeros(len(truth), dtype=np.int64)
    for label in np.unique(truth):
        rows = np.flatnonzero(truth == label)
        halves[rows] = np.arange(len(rows)) % 2
    return halves


@dataclass(frozen=True, slots=True)
class _Row:
    split: str
    number: int
    label: int
    shown: str
    """The label as the data writes it."""


def _labelled(source: Source, labels: LabelMap, ranges: Mapping[str, tuple[int, int]]) -> list[_Row]:
    """Return the labelled rows to sample from, ordered by a hash of split and row number.

    Raises:
        SourceError: a label is not a class; every label is checked.
    """
    column = source.columns.label
    found: list[tuple[float, _Row]] = []
    for split, (start, stop) in ranges.items():
        dataset = source.splits[split]
        if column is None or column not in dataset.column_names:
            continue
        drawn = np.zeros(stop - start, dtype=np.bool_)
        for near in source.sample_ranges(split, start, stop, _MOST_ROW_GROUPS):
            drawn[near.start - start : near.stop - start] = True
        keys = counter_uniforms(0, split, 0, 0, np.arange(start, stop)).tolist()
        for i, (key, row) in enumerate(zip(keys, read_rows(dataset, [column], start, stop), strict=True), start=start):
            seen = {}
            for value in _single(row[column]):
                label = labels.class_id(value, split=split, row=i)
                if label is not None:
                    seen[label] = labels.shown(value, split)
            if drawn[i - start]:
                found += [(key, _Row(split, i, label, shown)) for label, shown in seen.items()]
    return [row for _, row in sorted(found, key=lambda pair: (pair[0], pair[1].split))]


def _single(value: object) -> Sequence[object]:
    """Return the labels of a row: a single one, or those of its words.

    Labels of spans are names, which do not depend on the order, so they are left out.
    """
    if not isinstance(value, list):
        return [value]
    return [] if any(isinstance(each, dict) for each in value) else [each for each in value if each != NO_LABEL]


def _sample(rows: Sequence[_Row], size: int) -> list[_Row]:
    """Return up to `size` rows with equal numbers of rows per label where possible."""
    rank: Counter[int] = Counter()
    ranked = []
    for row in rows:
        ranked.append((rank[row.label], row))
        rank[row.label] += 1
    ranked.sort(key=lambda pair: pair[0])  # stable
    return [row for _, row in ranked[:size]]


def _read(
    task: Task,
    source: Source,
    labels: LabelMap,
    tokenizer: PreTrainedTokenizerBase,
    tokenization: Tokenization,
    sample: Sequence[_Row],
) -> list[TokenizedExample]:
    """Tokenize the rows, each once; leave out unusable rows, which the capture reports."""
    found: dict[tuple[str, int], list[TokenizedExample]] = {}
    for row in sorted(sample, key=lambda row: (row.split, row.number)):  # by row group
        item = read_examples(source, row.split, row.number, row.number + 1, labels)
        tokens = task.tokenize(item, row.split, tokenizer, tokenization)
        found[row.split, row.number] = [
            each
            for each in tokens
            if isinstance(each, TokenizedExample) and (task.hard_labels([each]) != NO_LABEL).any()
        ]
    places = dict.fromkeys((row.split, row.number) for row in sample)
    return [each for place in places for each in found[place]]
