"""`softlabel inspect --html`: one self-contained page, so that people look at a cache rather than read about it.

Jinja2 with autoescape writes it: what comes from data sets is text. It holds no script and asks for nothing from anywhere, which its own
Content-Security-Policy also says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.cache.reading.reader import Cache
from pipeline.cache.storage.commit import write_text
from pipeline.cache.views.charts import Chart, histogram
from pipeline.cache.views.inspection import totals
from pipeline.cache.views.provenance import rows_text
from pipeline.records import CachedExample, Full, Sampled
from pipeline.softlabels import served_temperature, target
from pipeline.softlabels.names import encoding_text
from pipeline.sources.files.loading import redact

if TYPE_CHECKING:
    from pipeline.records import Target

#: What the distributions are taken over: rows spread over the split, as many as reach so many positions.
_MEASURED_GROUPS, _MEASURED_POSITIONS = 32, 50_000


@dataclass(frozen=True, slots=True)
class Candidate:
    """One soft label as it is shown."""

    name: str
    weight: float
    is_next: bool
    """Whether it is what the data has here."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a sample row, and what the teacher expected in its place."""

    text: str
    candidates: tuple[Candidate, ...] = ()
    weight: float | None = None
    """The target weight of the token itself; None: it carries no soft labels."""
    kept: int = 0
    entropy: float | None = None
    rest: float = 0.0
    """The mass that is not shown."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row."""

    title: str
    facts: str
    tokens: tuple[Token, ...] = ()
    cut: int = 0
    """Tokens that are left out."""
    text: str = ""
    candidates: tuple[Candidate, ...] = ()
    """Classifiers: the classes of the row."""


def write_page(
    cache: Cache, path: Path, *, split: str | None = None, rows: int = 6, tokens: int = 160, top: int = 6
) -> None:
    """Write the page of a cache.

    Args:
        split: whose rows are measured and shown; default: the first.
        rows: how many rows to show, `tokens` of each and `top` soft labels of each position.

    Raises:
        CacheError: no such split, or the page cannot be written.
    """
    chosen = split or cache.splits[0]
    dataset = cache.dataset(chosen)
    measured = list(_measured_rows(dataset))
    shown = itertools.islice(dataset, rows)
    write_text(
        path,
        _template().render(
            title=redact(cache.manifest.contract.teacher.name),
            facts=_facts(cache),
            totals=totals(cache),
            split=chosen,
            measured=len(measured),
            positions=sum(len(row.soft) for row in measured),
            charts=_charts(cache, measured),
            is_tokens=cache.manifest.contract.label_names is None,
            samples=[_sample(cache, row, tokens, top) for row in shown],
        ),
    )


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


def _facts(cache: Cache) -> list[tuple[str, str]]:
    """The contract in the order in which people ask for it."""
    manifest, contract = cache.manifest, cache.manifest.contract
    teacher, source = contract.teacher, contract.source
    facts = [
        ("task", f"{contract.task}, {contract.num_classes:,} classes"),
        ("teacher", f"{redact(teacher.name)}{f' at {teacher.revision}' if teacher.revision else ''}"),
        ("model", f"{teacher.architecture}, {teacher.num_parameters:,} parameters, {teacher.dtype}"),
        ("weights", teacher.weights_sha256),
        ("tokenizer", f"{contract.tokenizer.vocabulary_size:,} tokens, {contract.tokenizer.sha256}"),
        ("source", f"{redact(source.name)}{f' at {source.revision}' if source.revision else ''}"),
        ("rows of", rows_text(contract)),
        ("encoding", encoding_text(contract.encoding)),
        ("seed", str(contract.seed)),
        ("made with", ", ".join(f"{name} {version}" for name, version in contract.versions.items())),
    ]
    if contract.label_names:
        facts.insert(1, ("labels", ", ".join(contract.label_names)))
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


def _measured_rows(dataset: Any) -> Iterator[CachedExample]:
    """Rows of row groups spread over the split; every position of a row, so that what is measured is not a part of one."""
    groups = len(dataset.groups)
    positions = 0
    for group in dict.fromkeys(np.linspace(0, groups - 1, min(groups, _MEASURED_GROUPS)).round().astype(int).tolist()):
        share = _MEASURED_POSITIONS * (group + 1) / groups
        for number in range(int(dataset.starts[group]), int(dataset.starts[group + 1])):
            if positions >= share and positions:
                break
            row = dataset[number]
            positions += len(row.soft)
            yield row


def _charts(cache: Cache, rows: Sequence[CachedExample]) -> list[Chart]:
    encoding = cache.manifest.contract.encoding
    temperature = served_temperature(encoding)
    goals = [target(row.soft, temperature, entropy=row.entropy) for row in rows]
    found: list[Chart | None] = []
    if not isinstance(encoding, Full):
        certain = np.concatenate([_kept_mass(row, goal) for row, goal in zip(rows, goals, strict=True)])
        what = "on the classes kept for certain" if isinstance(encoding, Sampled) else "on the classes kept"
        found.append(
            histogram("Kept mass", certain, f"The teacher's mass {what}, by position", low=0.0, high=1.0, percent=True)
        )
        counts = np.concatenate([goal.offsets.diff().numpy() for goal in goals])
        found.append(histogram("Kept classes", counts, "Classes kept, by position", whole=True))
    sure = np.concatenate([_confidence(goal) for goal in goals])
    found.append(
        histogram(
            "Confidence",
            sure,
            "Weight of the teacher's most likely class, by position",
            low=0.0,
            high=1.0,
            percent=True,
        )
    )
    by_position = isinstance(encoding, Full) or all(row.entropy is not None for row in rows)
    parts = [-goal.negative_entropy.numpy() for goal in goals] if by_position else [_mean_entropy(row) for row in rows]
    where = "by position" if by_position else "mean of each row"
    found.append(histogram("Entropy", np.concatenate(parts), f"The teacher's entropy in nats, {where}", low=0.0))
    lengths = np.asarray([row.example.num_tokens for row in rows])
    found.append(histogram("Row length", lengths, "Tokens of a row", whole=True))
    return [chart for chart in found if chart is not None]


def _kept_mass(row: CachedExample, goal: Target) -> np.ndarray:
    """(N,)."""
    if goal.log_residual is not None:
        return np.asarray(1 - goal.log_residual.double().exp().numpy())
    weights = row.soft.top_logprobs.double().exp().numpy()
    return np.add.reduceat(weights, row.soft.top_offsets[:-1].numpy()) if len(weights) else weights


def _confidence(goal: Target) -> np.ndarray:
    """(N,): every position keeps a class."""
    return np.maximum.reduceat(goal.weights.double().numpy(), goal.offsets[:-1].numpy())


def _mean_entropy(row: CachedExample) -> np.ndarray:
    return np.asarray([row.teacher_entropy_sum / max(len(row.soft), 1)])


def _sample(cache: Cache, row: CachedExample, tokens: int, top: int) -> Sample:
    title = f"Source row {row.example.source_row}" + (f", piece {row.example.piece}" if row.example.piece else "")
    goal = target(row.soft, served_temperature(row.soft.encoding))
    if row.example.supervised is not None:
        return _token_sample(cache, row, goal, title, tokens, top)
    names = cache.manifest.contract.label_names or ()
    label = row.example.label
    text = row.example.text
    if text is None:
        text = str(cache.tokenizer.decode(row.example.input_ids.tolist()))
    named = [Candidate(names[i], weight, i == label) for i, weight in _heaviest(goal, 0, top)]
    facts = "no label" if label is None else f"label {names[label]}"
    return Sample(
        title,
        facts,
        text=text if row.example.text_pair is None else f"{text}\n{row.example.text_pair}",
        candidates=tuple(named),
    )


def _token_sample(cache: Cache, row: CachedExample, goal: Target, title: str, tokens: int, top: int) -> Sample:
    assert row.example.supervised is not None
    ids = row.example.input_ids.tolist()
    made_at = {int(position) + 1: n for n, position in enumerate(np.flatnonzero(row.example.supervised))}
    texts: dict[int, str] = {}

    def decode(token: int) -> str:
        if token not in texts:
            texts[token] = str(cache.tokenizer.decode([token]))
        return texts[token]

    shown = []
    for place, token in enumerate(ids[:tokens]):
        n = made_at.get(place)
        if n is None:
            shown.append(Token(decode(token)))
            continue
        part = slice(int(goal.offsets[n]), int(goal.offsets[n + 1]))
        hit = goal.weights[part][goal.ids[part] == token]
        best = _heaviest(goal, n, top)
        shown.append(
            Token(
                decode(token),
                candidates=tuple(Candidate(decode(i), weight, i == token) for i, weight in best),
                weight=float(hit[0]) if len(hit) else 0.0,
                kept=part.stop - part.start,
                entropy=None if row.entropy is None else float(row.entropy[n]),
                rest=max(0.0, 1.0 - sum(weight for _, weight in best)),
            )
        )
    count = max(len(row.soft), 1)
    facts = f"{len(ids):,} tokens, {len(row.soft):,} with soft labels; teacher's loss {row.teacher_nll_sum / count:.2f} nats a token"
    return Sample(title, facts, tokens=tuple(shown), cut=max(0, len(ids) - tokens))


def _heaviest(goal: Target, n: int, top: int) -> list[tuple[int, float]]:
    part = slice(int(goal.offsets[n]), int(goal.offsets[n + 1]))
    order = goal.weights[part].argsort(descending=True, stable=True)[:top]
    return list(zip(goal.ids[part][order].tolist(), goal.weights[part][order].tolist(), strict=True))
