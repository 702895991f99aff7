"""Write the self-contained HTML page of `softlabel inspect --html`.

Jinja2 renders it with autoescape, so that strings from data sets are text. The page has no scripts
and loads nothing; its Content-Security-Policy forbids both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.reading.reader import Cache
from pipeline.cache.storage.commit import write_text
from pipeline.cache.views.agreement import MOST_CLASSES, Agreement, Balance, Confusion, agreement, balance, confusion
from pipeline.cache.views.charts import BOTTOM, HEIGHT, RIGHT, TOP, WIDTH, Axis, Chart, bars, histogram
from pipeline.cache.views.inspection import labelled, totals
from pipeline.cache.views.measures import Disagreement, SplitMeasures, measure
from pipeline.cache.views.provenance import judge_text, rows_text, tokenizer_name, tokenizer_text
from pipeline.cache.views.samples import CHARACTERS, Sample, sample_of, text_of
from pipeline.cache.views.scores import score_charts, score_facts, score_summary, scores_of_split
from pipeline.cache.views.units import classes_of, classes_text, unit_of
from pipeline.records import NO_LABEL, CachedExample, Contract, Full, Sampled, Score
from pipeline.softlabels.names import encoding_text
from pipeline.sources.files.loading import redact
from pipeline.tasks import get_task

#: Number of tokens whose counts the page of a language model shows.
_MOST_TOKENS = 12
#: Groups of ranks in the teacher's order: name, and last rank.
_RANKS = (("1", 1), ("2", 2), ("3-5", 5), ("6-10", 10), ("11-100", 100), ("101+", math.inf))


@dataclass(frozen=True, slots=True)
class SplitPart:
    """The part of the page about one split."""

    name: str
    measured: str
    """Over how many rows and positions the figures are taken."""
    summary: tuple[str, ...]
    charts: tuple[Chart, ...]
    balance: Balance | None
    """None: the split has no rows, or holds scores or answers in a text."""
    agreement: Agreement | None
    confusion: Confusion | None
    disagreements: tuple[Disagreement, ...]


def write_page(
    cache: Cache, path: Path, *, split: str | None = None, rows: int = 6, tokens: int = 160, top: int = 6
) -> None:
    """Write the page of a cache: measures of every split, and sample rows of one of them.

    Args:
        split: the split whose rows are shown. Default: the first.
        rows: number of rows to show.
        tokens: tokens to show of each row.
        top: soft labels to show of each position.

    Raises:
        CacheError: there is no such split, or the page cannot be written.
    """
    contract = cache.manifest.contract
    chosen = split or cache.splits[0]
    shown = itertools.islice(cache.dataset(chosen), rows)
    is_score = isinstance(contract.encoding, Score)
    measured = [] if is_score else [measure(cache, name) for name in cache.splits]
    parts = [_split_part(cache, found) for found in measured]
    write_text(
        path,
        _template().render(
            title=redact(contract.teacher.name),
            heads=_heads(cache),
            facts=_facts(cache),
            totals=totals(cache),
            labelled=_labelled(cache, measured),
            frame={"width": WIDTH, "height": HEIGHT, "top": TOP, "bottom": BOTTOM, "right": RIGHT},
            parts=[_score_part(cache, name) for name in cache.splits] if is_score else parts,
            split=chosen,
            is_tokens=contract.label_names is None,
            is_images=get_task(contract.task).reads == "images",
            of=_of(cache),
            names=classes_of(contract) or (),
            samples=[
                _score_sample(cache, row) if is_score else sample_of(cache, row, tokens=tokens, top=top)
                for row in shown
            ],
        ),
    )


def _of(cache: Cache) -> str:
    """Return the name of what has labels, such as rows, words, or `answers` of several labels."""
    task = get_task(cache.manifest.contract.task)
    if task.names == "places":
        return "ends"
    return {"positions": "rows", "labels": "answers"}.get(unit := unit_of(task), unit)


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipeline.cache.views"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("inspect.html.j2")


def _heads(cache: Cache) -> list[tuple[str, str]]:
    """Return the most important facts, as names and values."""
    contract = cache.manifest.contract
    return [
        ("cache_id", cache.manifest.cache_id),
        ("task", f"{contract.task}, {classes_text(contract)}"),
        ("teacher", _teacher(contract)),
        ("encoding", encoding_text(contract.encoding)),
        ("source", redact(contract.source.name)),
    ]


def _labelled(cache: Cache, measured: Sequence[SplitMeasures]) -> dict[str, int]:
    """Return the number of labelled rows, or words, of each split for which it is known.

    It is known from the footers, or if all rows of a split were measured.
    """
    if cache.manifest.contract.label_names is None:
        return {}
    counted = {each.split: int((each.labels != NO_LABEL).sum()) for each in measured if len(each.lengths) == each.rows}
    return counted | labelled(cache)


def _teacher(contract: Contract) -> str:
    """Return the teacher's name, and its number of parameters if known."""
    teacher = contract.teacher
    parts = [redact(teacher.name)] + ([f"{teacher.num_parameters:,} parameters"] if teacher.num_parameters else [])
    return ", ".join(parts)


def _facts(cache: Cache) -> list[tuple[str, str]]:
    """Return the contract as names and values, the most important first."""
    manifest, contract = cache.manifest, cache.manifest.contract
    teacher, source = contract.teacher, contract.source
    facts = [
        ("task", f"{contract.task}, {classes_text(contract)}"),
        ("teacher", f"{redact(teacher.name)}{f' at {teacher.revision}' if teacher.revision else ''}"),
        ("model", f"{teacher.architecture}, {teacher.num_parameters:,} parameters, {teacher.dtype}"),
        ("weights", teacher.weights_sha256),
        (tokenizer_name(contract), tokenizer_text(contract)),
        ("source", f"{redact(source.name)}{f' at {source.revision}' if source.revision else ''}"),
        ("rows of", rows_text(contract)),
        ("encoding", encoding_text(contract.encoding)),
        ("seed", str(contract.seed)),
        ("made with", ", ".join(f"{name} {version}" for name, version in contract.versions.items())),
    ]
    if contract.label_names:
        facts.insert(1, ("labels", ", ".join(contract.label_names)))
    if (judged := judge_text(contract)) is not None:
        facts.insert(2, ("labelled by", judged))
    if manifest.probe is not None:
        probe = manifest.probe
        facts.append(
            (
                "alignment",
                f"{probe.verdict}: weight of the hard label {probe.previous:.4f} before, {probe.aligned:.4f} here, {probe.following:.4f} after",
            )
        )
    if manifest.bad_rows:
        facts.append(("set aside", f"{manifest.bad_rows:,} rows, listed in reports/bad-rows.tsv"))
    facts += [("made from", f"{redact(each.operation)}: {each.cache_id}") for each in manifest.ancestry]
    return [*facts, ("cache_id", manifest.cache_id)]


def _split_part(cache: Cache, found: SplitMeasures) -> SplitPart:
    contract = cache.manifest.contract
    names, counted, of_what = classes_of(contract), None, _of(cache)
    unit = "positions" if names is None else of_what
    most, of = (_MOST_TOKENS, "tokens") if names is None else (MOST_CLASSES, "classes")

    def named(i: int) -> str:
        return repr(str(cache.tokenizer.decode([i]))) if names is None else names[i]

    agreed = agreement(found.labels, found.predicted, named)
    of_places = get_task(contract.task).names == "places"
    if len(found.labels) and not of_places:
        counted = balance(
            found.labels,
            found.predicted,
            contract.num_classes,
            named,
            most=most,
            of=of,
        )
    return SplitPart(
        found.split,
        _measured(found, None if unit == "rows" else unit),
        tuple(_summary(found, agreed, tokens=_tokens_of(contract), of=of_what)),
        tuple(_charts(contract, found, unit)),
        counted,
        agreed,
        None if names is None or of_places else confusion(found.labels, found.predicted, names),
        found.disagreements,
    )


def _score_part(cache: Cache, split: str) -> SplitPart:
    found = scores_of_split(cache, split)
    rows = len(found.lengths)
    measured = f"All {rows:,} rows." if rows == found.rows else f"A sample: {rows:,} of {found.rows:,} rows."
    summary, charts = tuple(score_summary(cache, found)), tuple(score_charts(cache, found))
    return SplitPart(split, measured, summary, charts, None, None, None, ())


def _score_sample(cache: Cache, row: CachedExample) -> Sample:
    text = text_of(cache, row)
    cut = max(0, len(text) - CHARACTERS)
    title = f"Source row {row.example.source_row}"
    return Sample(title, score_facts(cache, row), text=text[:CHARACTERS], cut=cut)


def _measured(found: SplitMeasures, unit: str | None) -> str:
    """Describe how many rows were measured: `All 300 rows.`, or how many of how many.

    Args:
        unit: what rows have several of; None: rows have one position each.
    """
    rows, positions = len(found.lengths), len(found.labels)
    if not found.rows:
        return "No rows."
    of = f", {positions:,} {unit}" if unit else ""
    if rows == found.rows:
        return f"All {rows:,} rows{of}."
    whole = f", {positions:,} of {found.positions:,} {unit}" if unit else ""
    return f"A sample: {rows:,} of {found.rows:,} rows{whole}, from all over the split."


def _tokens_of(contract: Contract) -> str | None:
    """Return which tokens positions predict: `next`, `hidden` or `target`; None: no tokens."""
    task = get_task(contract.task)
    return None if not task.predicts_tokens else {"hidden": "hidden", "target": "target"}.get(task.label_source, "next")


def _summary(found: SplitMeasures, agreed: Agreement, *, tokens: str | None, of: str) -> list[str]:
    """Return sentences that compare the teacher with the labels.

    Args:
        tokens: as from `_tokens_of`.
        of: what has labels, in the plural.
    """
    if not found.rows:
        return []
    if not agreed.labelled:
        return [f"No {of.removesuffix('s')} has a label, so that the teacher cannot be compared with labels."]
    share = f"{agreed.accuracy:.1%}"
    if tokens is not None:
        lines = [
            f"The teacher's most likely token is the {tokens} token of the data at {share} of {agreed.labelled:,} positions."
        ]
        known = np.isfinite(found.nll)
        if known.all():
            loss = float(found.nll.sum()) / agreed.labelled
            lines.append(
                f"The teacher's loss is {loss:.3f} nats a token, its perplexity {math.exp(min(loss, 700)):,.2f}."
            )
        return lines
    lines = [
        f"The teacher agrees with the labels on {share} of {agreed.labelled:,} labelled {of} ({agreed.agreed:,}); "
        f"the most frequent label, \u2068{agreed.most_frequent}\u2069, is that of {agreed.most_frequent_count / agreed.labelled:.1%}."
    ]
    if agreed.unlabelled:
        lines.append(f"{agreed.unlabelled:,} {of} have no label.")
    return lines


def _charts(contract: Contract, found: SplitMeasures, unit: str) -> list[Chart]:
    """Return the charts of a split.

    Args:
        unit: what a soft label belongs to: `positions`, `words`, `answers`, `ends` or `rows`.
    """
    encoding = contract.encoding
    share = Axis("share of the teacher's mass", 0.0, 1.0, percent=True)
    uniform = math.log(contract.num_classes)
    of_uniform = (uniform, f"ln V = {uniform:.3f}: uniform over {contract.num_classes:,} classes")
    by = "" if unit == "rows" else f"by {unit.removesuffix('s')}" if found.by_position else "mean of each row"
    charts = [
        histogram("Confidence", found.confidence, "Weight of the teacher's most likely class", axis=share, of=unit),
        histogram(
            "Entropy",
            found.entropy,
            f"The teacher's entropy{f', {by}' if by else ''}",
            axis=Axis("nats", 0.0, uniform, mark=of_uniform),
            of=unit if found.by_position else "rows",
        ),
    ]
    if unit == "positions" and len(found.ranks):
        charts.append(_rank_chart(found.ranks, isinstance(encoding, Full)))
    if not isinstance(encoding, Full):
        what = "for certain" if isinstance(encoding, Sampled) else "in the cache"
        charts += [
            histogram("Kept mass", found.kept_mass, f"Mass of the classes kept {what}", axis=share, of=unit),
            histogram(
                "Kept classes", found.kept_classes, "Classes in the cache", axis=Axis("classes", whole=True), of=unit
            ),
        ]
    if get_task(contract.task).reads != "images":
        tokens = Axis("tokens", whole=True)
        charts.append(histogram("Row length", found.lengths, "Tokens of a row", axis=tokens, of="rows"))
    return [chart for chart in charts if chart is not None]


def _rank_chart(ranks: np.ndarray, is_full: bool) -> Chart:
    """Return a chart of the rank of the data's token among the teacher's predictions."""
    known = ranks[ranks >= 0]
    ends = [0.0, *(end for _, end in _RANKS)]
    counts = [int(((known > low) & (known <= high)).sum()) for low, high in itertools.pairwise(ends)]
    used = max((i for i, count in enumerate(counts) if count), default=0) + 1
    groups = list(zip((name for name, _ in _RANKS[:used]), counts[:used], strict=True))
    title = "place in the teacher's order"
    if not is_full:
        groups.append(("other", int((known == 0).sum())))
        title += "; other: not in its top"
    return bars(
        "Rank", groups, "Place of the data's token among the teacher's predictions", x_title=title, of="positions"
    )
