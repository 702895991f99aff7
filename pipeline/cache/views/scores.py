"""Compare the teacher's scores with those of the data, for each output of a cache of scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.cache.reading.reader import Cache
from pipeline.cache.views.charts import Axis, Chart, histogram
from pipeline.cache.views.samples import text_of
from pipeline.metrics.scores import pearson
from pipeline.records import CachedExample

#: Most rows of a split that are read, from row groups spread over the split.
MOST_ROWS = 50_000
#: Number of outputs with their own charts.
_CHARTS = 4


@dataclass(frozen=True, slots=True)
class SplitScores:
    """Scores of R rows of a split."""

    rows: int
    """Rows of the whole split."""
    teacher: np.ndarray
    """(R, outputs) float."""
    labels: np.ndarray
    """(R, outputs) float, nan if unknown."""
    lengths: np.ndarray
    """(R,) tokens of each row."""


def scores_of_split(cache: Cache, split: str, most: int = MOST_ROWS) -> SplitScores:
    """Read the scores of row groups spread over the split; all row groups of a small split."""
    dataset = cache.dataset(split)
    groups = len(dataset.groups)
    each = len(dataset) / groups
    few = np.unique(np.linspace(0, groups - 1, max(1, min(groups, round(most / each)))).round().astype(int))
    outputs = len(cache.manifest.contract.label_names or ())
    teacher: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for number, table in enumerate(dataset.tables(["teacher_scores", "position_labels", "input_ids"])):
        if number not in few:
            continue
        for found, name in ((teacher, "teacher_scores"), (labels, "position_labels")):
            found.append(table.column(name).combine_chunks().flatten().to_numpy().reshape(-1, outputs))
        lengths.append(np.diff(table.column("input_ids").combine_chunks().offsets.to_numpy()))
    return SplitScores(len(dataset), np.concatenate(teacher), np.concatenate(labels), np.concatenate(lengths))


def score_summary(cache: Cache, found: SplitScores) -> list[str]:
    """Return a sentence for each output: mean, spread, and correlation with the data's scores."""
    lines = []
    for i, name in enumerate(cache.manifest.contract.label_names or ()):
        teacher, labels = found.teacher[:, i], found.labels[:, i]
        known = ~np.isnan(labels)
        line = f"{name}: the teacher's scores have the mean {teacher.mean():.4g} and the standard deviation {teacher.std():.4g}"
        if known.any():
            r = pearson(labels[known], teacher[known])
            error = np.sqrt(np.square(teacher[known] - labels[known]).mean())
            line += f"; their correlation with the {known.sum():,} scores of the data is {r:.3f}, the root mean squared error {error:.4g}"
        else:
            line += "; the data has none to compare them with"
        lines.append(f"{line}.")
    return lines


def score_charts(cache: Cache, found: SplitScores) -> list[Chart]:
    """Return histograms of the teacher's and the data's scores for the first outputs.

    Both have the same axis. The last chart is of the lengths of the rows.
    """
    charts = []
    for i, name in enumerate((cache.manifest.contract.label_names or ())[:_CHARTS]):
        both = np.concatenate([found.teacher[:, i], found.labels[:, i]])
        axis = Axis(name, float(np.nanmin(both)), float(np.nanmax(both)))
        charts.append(histogram(f"{name}, teacher", found.teacher[:, i], "The teacher's scores", axis=axis, of="rows"))
        charts.append(histogram(f"{name}, data", found.labels[:, i], "The scores of the data", axis=axis, of="rows"))
    tokens = Axis("tokens", whole=True)
    charts.append(histogram("Row length", found.lengths, "Tokens of a row", axis=tokens, of="rows"))
    return [chart for chart in charts if chart is not None]


def score_lines(cache: Cache, row: CachedExample) -> Iterator[str]:
    """Yield the text of a row, and one line with its scores."""
    text = " ".join(text_of(cache, row).split())
    yield f"  {text if len(text) <= 160 else text[:157] + '...'}"
    yield f"  {score_facts(cache, row)}"


def score_facts(cache: Cache, row: CachedExample) -> str:
    """Return the scores of a row: `similarity: teacher 3.91, data 4`."""
    labels = row.example.labels
    assert labels is not None
    said = []
    for name, score, label in zip(
        cache.manifest.contract.label_names or (), row.soft.top_logprobs.tolist(), labels.tolist(), strict=True
    ):
        said.append(f"{name}: teacher {score:.4g}, data {'not known' if np.isnan(label) else f'{label:.4g}'}")
    return "; ".join(said)
