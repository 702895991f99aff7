"""Is the order of the data's classes the teacher's?

Looked at on a sample of labelled rows, before anything is written.

Numbers are classes by position, and two conventions that differ (1 = sport, 1 = business) give hard
labels that are wrong without a trace. Where another order of the classes fits what the teacher
predicts far better, that is the likely reason.
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

#: Rows of the sample: a twentieth of the source within these bounds.
_LEAST, _MOST, _SHARE = 128, 512, 20
#: Rows that a judge is tried on.
_TRIED = 200
#: Of a source that is read by row group.
_MOST_ROW_GROUPS = 16
#: The chance of a refusal where no other order fits better, over all cycles that are tested.
_ALPHA = 1e-3
#: How well a class has to signal a label: the share of the label's rows that are given the class,
#: less that of other labels' rows.
_LEAST_SIGNAL = 0.5
#: By how much it has to signal it better than the class of the label's own number does.
_LEAST_GAIN = 0.5
#: A label of fewer sampled rows is left out: nothing can be said of it.
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
        labels: without a label map: with one the user has said what the order is. None, where
            classes are tokens: there is nothing to compare.
        ranges: the rows `[start, stop)` of each split that are read.
        append: they are added to a finished cache, whose contract cannot take a label map any more.

    Raises:
        SourceError: names the labels, and the `--label-map` that would mend it; or a label that is
            no class.
    """
    if task.names != "classes":  # each label is a class by itself, or answers have no order
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
    """Show how often a teacher that never saw a label is right, on labelled rows of any split but test.

    Args:
        labels, ranges: as in `check_class_order`.
        compare_order: check the order of the classes too, on the same rows, where the data's labels
            are not the classes' names.

    Raises:
        SourceError: as `check_class_order` raises it.
    """
    rows = [] if labels is None else _labelled(source, labels, ranges)
    known = [row for row in rows if not row.split.startswith("test")]
    examples = [] if labels is None else _read(task, source, labels, teacher.tokenizer, tokenization, known[:_TRIED])
    if labels is None or not examples:
        logger.info("%s: no labelled rows to try the teacher on (rows of test are not looked at)", source.name)
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
            "%s: it is not shown to be better than that one answer, and students of it would be no better; try --calibrate, --shots %d, "
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
    """(N,) labels and (N,) most likely classes of labelled rows; None: they do not fit in memory, of which the capture's own message says what to do."""
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
    """The labels that belong to other classes, beyond chance.

    Args:
        truth, predicted: (N,) int64 labels and the teacher's argmax, in a random order or a fixed
            one that says nothing of them.

    Returns:
        Label -> class, for those that move; empty where the order as it is fits, and where the
            teacher or the labels are too bad to say.

    The assignment that fits best is chosen on one half of the rows (linear assignment on how much
    better than elsewhere each class is predicted for each label, so that a class that is predicted
    everywhere signals nothing), and tested on the other half, so that having chosen among K! orders
    costs nothing: a cycle of it counts where an exact paired sign test rejects "as often right as
    before" at `_ALPHA` over the number of cycles, where the signals pass a test against
    independence, and where they are strong, not only sure: a bad teacher may favour a wrong class
    slightly, but surely.
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
    """P(z scores as large as these, taken together), where the teacher's predictions say nothing of the labels (Stouffer)."""
    return math.erfc(sum(scores) / math.sqrt(2 * len(scores))) / 2


def _z(truth: np.ndarray, predicted: np.ndarray, label: int, to: int) -> float:
    """How many standard errors a class is predicted more often for a label than for the others (two proportions, pooled)."""
    ours, hit = truth == label, predicted == to
    n, m = int(ours.sum()), int((~ours).sum())
    share = float(hit.mean())
    if not n or not m or share in (0.0, 1.0):
        return 0.0
    return float(hit[ours].mean() - hit[~ours].mean()) / math.sqrt(share * (1 - share) * (1 / n + 1 / m))


def _sign_test(gained: int, lost: int) -> float:
    """P(at least so many of the rows that changed are gains), where both are as likely."""
    changed = gained + lost
    ways = sum(math.comb(changed, i) for i in range(gained, changed + 1))
    return float(ways / 2**changed)


def _signals(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(V, V): how much more often class j is predicted for label i than for the other labels, each of which counts the same; 0 for labels without rows."""
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (truth, predicted), 1)
    rows = counts.sum(1)
    enough = rows >= _LEAST_ROWS
    shares = np.where(enough[:, None], counts / np.maximum(rows, 1)[:, None], 0.0)
    others = (shares.sum(0) - shares) / max(int(enough.sum()) - 1, 1)
    signals: np.ndarray = np.where(enough[:, None], shares - others, 0.0)
    return signals


def _assignment(signals: np.ndarray) -> list[int]:
    """Label -> class, one to one; of equally good ones the one that moves least."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(signals + 1e-6 * np.eye(len(signals)), maximize=True)
    return [int(column) for column in columns]


def _cycles(order: Sequence[int]) -> list[list[int]]:
    """The labels that move, a list for each cycle."""
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
    """(N,): 0 and 1 in turns within each label."""
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
    """As the data writes it."""


def _labelled(source: Source, labels: LabelMap, ranges: Mapping[str, tuple[int, int]]) -> list[_Row]:
    """The labelled rows that a sample is drawn from, in an order that says nothing of them: by a hash of where they stand.

    Every label is looked at: one that is no class is told now.
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
    """The labels of a row: one, or those of its words.

    Those of spans are names, whatever their order, and are read with the text.
    """
    if not isinstance(value, list):
        return [value]
    return [] if any(isinstance(each, dict) for each in value) else [each for each in value if each != NO_LABEL]


def _sample(rows: Sequence[_Row], size: int) -> list[_Row]:
    """So many rows, each label as often as the others where it has as many rows: a label that is rare is looked at too."""
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
    """The tokens of the rows, each once, without those that cannot be used: the capture says what is wrong with them."""
    found: dict[tuple[str, int], list[TokenizedExample]] = {}
    for row in sorted(sample, key=lambda row: (row.split, row.number)):  # one row group after another
        item = read_examples(source, row.split, row.number, row.number + 1, labels)
        tokens = task.tokenize(item, row.split, tokenizer, tokenization)
        found[row.split, row.number] = [
            each
            for each in tokens
            if isinstance(each, TokenizedExample) and (task.hard_labels([each]) != NO_LABEL).any()
        ]
    places = dict.fromkeys((row.split, row.number) for row in sample)
    return [each for place in places for each in found[place]]
