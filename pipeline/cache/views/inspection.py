"""Show a cache as text: contract, totals, agreement with the labels, first rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cache.format.manifest import Layout
from pipeline.cache.reading.reader import Cache
from pipeline.cache.views.measures import measure
from pipeline.cache.views.provenance import judge_text, rows_text, tokenizer_text
from pipeline.cache.views.samples import place_name, share_of_yes, text_of
from pipeline.cache.views.scores import score_lines, score_summary, scores_of_split
from pipeline.cache.views.tokens import marked_tokens, words_of
from pipeline.cache.views.units import classes_text, unit_of
from pipeline.metrics import accuracy
from pipeline.records import NO_LABEL, CachedExample, Full, Score, is_known
from pipeline.softlabels import rows as positions_of
from pipeline.softlabels import served_temperature, target
from pipeline.softlabels.names import encoding_text
from pipeline.tasks import get_task

#: Positions of a split over which the agreement of teacher and labels is measured: about a second's
#: work.
_AGREEMENT_ROWS = 10_000


def labelled(cache: Cache) -> dict[str, int]:
    """Return how many rows, words or labels of each split have a hard label.

    For rows this is read from the footers of the shards; for words and labels the column is read.
    Empty if it is not known: the labels are tokens, or the cache is behind a URL.
    """
    found: dict[str, int] = {}
    if get_task(cache.manifest.contract.task).label_source == "positions":
        return {} if cache.remote is not None else {split: _labelled_positions(cache, split) for split in cache.splits}
    for shard in cache.manifest.shards:
        path = Layout(cache.root).shard(shard.name)
        if cache.remote is not None or "label" not in cache.manifest.contract.columns or not path.is_file():
            return {}
        footer = pq.read_metadata(path)
        for group in map(footer.row_group, range(footer.num_row_groups)):
            columns = map(group.column, range(group.num_columns))
            statistics = next((column.statistics for column in columns if column.path_in_schema == "label"), None)
            if statistics is None or statistics.null_count is None:
                return {}
            found[shard.split] = found.get(shard.split, 0) + group.num_rows - statistics.null_count
    return found


def _labelled_positions(cache: Cache, split: str) -> int:
    """Count the known position labels of a split, one row group at a time."""
    tables = cache.dataset(split).tables(["position_labels"])
    found = sum(int(is_known(pc.list_flatten(table.column(0)).to_numpy()).sum()) for table in tables)
    # an answer has two positions, and both are known or neither is
    return found // 2 if get_task(cache.manifest.contract.task).names == "places" else found


def totals(cache: Cache) -> dict[str, dict[str, float]]:
    """Return rows, positions, tokens, bytes and bytes per position of each split."""
    out: dict[str, dict[str, float]] = {}
    for split in cache.splits:
        shards = cache.manifest.split_shards(split)
        total: dict[str, float] = {
            key: sum(getattr(s, key) for s in shards) for key in ("rows", "positions", "tokens", "bytes")
        }
        total["shards"] = len(shards)
        total["bytes_per_position"] = round(total["bytes"] / max(total["positions"], 1), 1)
        out[split] = total
    return out


def describe(cache: Cache, *, split: str | None, rows: int, tokens: int, top: int) -> Iterator[str]:
    """Yield the lines that `softlabel inspect` prints."""
    contract = cache.manifest.contract
    teacher, source = contract.teacher, contract.source
    of_images = get_task(contract.task).reads == "images"
    yield f"cache_id    {cache.manifest.cache_id}"
    classes = classes_text(contract).replace(",", "")
    yield f"task        {contract.task}, {classes}" + (
        f" ({', '.join(contract.label_names[:8])})" if contract.label_names else ""
    )
    yield f"teacher     {teacher.name} ({teacher.architecture}, {teacher.num_parameters / 1e6:.1f}M parameters, {teacher.dtype}, weights {teacher.weights_sha256[:12]})"
    if (judged := judge_text(contract)) is not None:
        yield f"labels      {judged}"
    yield f"{'processor' if of_images else 'tokenizer':<12}{tokenizer_text(contract, short=True)}"
    yield f"source      {source.name}" + (f", revision {source.revision}" if source.revision else "")
    yield f"rows of     {rows_text(contract)}"
    yield f"encoding    {encoding_text(contract.encoding)}"
    probe = cache.manifest.probe
    if probe is not None:
        yield f"alignment   {probe.verdict}: weight of the hard label {probe.previous:.4f} before, {probe.aligned:.4f} here, {probe.following:.4f} after ({probe.positions} positions)"
    if cache.manifest.bad_rows:
        yield f"set aside   {cache.manifest.bad_rows} rows, listed in reports/bad-rows.tsv"
    yield ""
    yield f"{'split':<14}{'shards':>8}{'rows':>12}{'positions':>14}{'bytes':>16}{'bytes/position':>16}"
    for name, total in totals(cache).items():
        yield f"{name:<14}{total['shards']:>8,}{total['rows']:>12,}{total['positions']:>14,}{total['bytes']:>16,}{total['bytes_per_position']:>16,.1f}"
    yield from _agreements(cache)
    chosen = split or cache.splits[0]
    for row in itertools.islice(cache.dataset(chosen), rows):
        yield ""
        length = "" if of_images else f", {row.example.num_tokens} tokens"
        kept = "".join(f", {name} {str(value)[:40]}" for name, value in row.example.kept.items())
        yield f"{chosen}, source row {row.example.source_row}, piece {row.example.piece}{length}{kept}"
        follows = row.example.labels is None
        hides = not follows and contract.label_names is None
        several = get_task(contract.task).names == "positions"
        if not of_images:
            yield f"  {marked_tokens(cache.tokenizer, row.example.input_ids.tolist(), row.example.supervised, follows=follows)}"
        if get_task(contract.task).names == "places":
            yield from _places(cache, row, top)
        elif isinstance(contract.encoding, Score):
            yield from score_lines(cache, row)
        elif several:
            yield from _labels(cache, row, top)
        elif row.example.supervised is None:
            yield from _classes(cache, row, top)
        elif follows or hides:
            yield from _tokens(cache, row, tokens, top)
        else:
            yield from _words(cache, row, tokens, top)


def _agreements(cache: Cache) -> Iterator[str]:
    """Yield the agreement of the teacher with the labels for each split that has labels.

    Nothing for token labels, and nothing behind a URL, where measuring would download shards.
    """
    unit = unit_of(get_task(cache.manifest.contract.task))
    if cache.remote is not None or unit == "positions":
        return
    for split in cache.splits:
        if unit == "scores":
            yield from (f"{split}: {line}" for line in score_summary(cache, scores_of_split(cache, split)))
            continue
        found = measure(cache, split, most=_AGREEMENT_ROWS)
        count = int((found.labels != NO_LABEL).sum())
        if not count:
            continue
        rows = len(found.lengths)
        of = "" if rows == found.rows else f", in a sample of {rows:,} of {found.rows:,} rows"
        yield f"{split}: teacher agrees with the labels on {accuracy(found.labels, found.predicted):.1%} of {count:,} {'known' if unit == 'labels' else 'labelled'} {unit}{of}"


def _classes(cache: Cache, row: CachedExample, top: int) -> Iterator[str]:
    names = cache.manifest.contract.label_names or ()
    text = row.example.text if row.example.text is not None else text_of(cache, row)
    yield f"  {_short(' '.join(text.split()), 160)}"
    label = "none" if row.example.label is None else names[row.example.label]
    believed = "  ".join(f"{names[i]} {weight:.1%}" for i, weight in _best(row, 0, top))
    yield f"  label {label}; teacher: {believed}"


def _places(cache: Cache, row: CachedExample, top: int) -> Iterator[str]:
    """Yield question and text, then a line for each end of the answer: label and predictions."""
    labels = row.example.labels
    assert labels is not None
    yield f"  {_short(' '.join(text_of(cache, row).split()), 160)}"
    for n, name in enumerate(cache.manifest.contract.label_names or ()):
        label = "none" if int(labels[n]) == NO_LABEL else place_name(cache, row, int(labels[n]))
        believed = "  ".join(f"{place_name(cache, row, i)} {weight:.1%}" for i, weight in _best(row, n, top))
        yield f"  {name}: label {label}; teacher: {believed}"


def _labels(cache: Cache, row: CachedExample, top: int) -> Iterator[str]:
    """Yield the text, the labels that it has, and the labels that are likeliest by the teacher."""
    names, labels = cache.manifest.contract.label_names or (), row.example.labels
    assert labels is not None
    yield f"  {_short(' '.join(text_of(cache, row).split()), 160)}"
    has = [name for name, label in zip(names, labels.tolist(), strict=True) if label == 1]
    unknown = int((labels == NO_LABEL).sum())
    given = ", ".join(has) or ("not known" if unknown == len(labels) else "none")
    shares = share_of_yes(row)
    best = np.argsort(-shares, kind="stable")[:top]
    likeliest = "  ".join(f"{names[i]} {shares[i]:.1%}" for i in best.tolist())
    yield f"  labels {given}{f' ({unknown} not known)' if 0 < unknown < len(labels) else ''}; teacher: {likeliest}"


def _tokens(cache: Cache, row: CachedExample, tokens: int, top: int) -> Iterator[str]:
    """Yield a line for each supervised position: its target token, and the teacher's prediction."""
    assert row.example.supervised is not None
    ids = row.example.input_ids.tolist()

    def decode(tokens: list[int]) -> str:
        return str(cache.tokenizer.decode(tokens))

    yield f"  {_short(decode(ids), 240)!r}"
    mean_entropy = row.teacher_entropy_sum / max(len(row.soft), 1)
    kept = (row.soft.top_offsets.diff() + row.soft.tail_offsets.diff()).float()
    yield f"  teacher: {row.teacher_nll_sum / max(len(row.soft), 1):.2f} nats a token, entropy {mean_entropy:.2f}; {float(kept.mean()):.1f} classes kept a position"
    own = row.label_logprobs
    logprob = "" if own is None else f"{'logprob':>9}"
    hidden = row.example.labels
    source = get_task(cache.manifest.contract.task).label_source
    kind = {"hidden": "hidden token", "target": "target token"}.get(source, "next token")
    yield f"  {'position':>8}  {kind:<18}{'kept':>6}{'entropy':>9}{logprob}  soft labels"
    for n, position in enumerate(np.flatnonzero(row.example.supervised)[:tokens].tolist()):
        believed = "  ".join(f"{decode([i])!r} {weight:.1%}" for i, weight in _best(row, n, top))
        entropy = "-" if row.entropy is None else f"{float(row.entropy[n]):.2f}"
        logprob = "" if own is None else f"{float(own[n]):>9.2f}"
        token = ids[position + 1] if hidden is None else int(hidden[n])
        yield f"  {position:>8}  {decode([token])!r:<18}{int(kept[n]):>6}{entropy:>9}{logprob}  {believed}"


def _words(cache: Cache, row: CachedExample, words: int, top: int) -> Iterator[str]:
    """Yield a line for each word: its label, and the likeliest classes by the teacher."""
    labels, names = row.example.labels, cache.manifest.contract.label_names or ()
    assert row.example.supervised is not None
    assert labels is not None
    found = [
        _short(word if word.isprintable() else repr(word), 24)
        for word in words_of(cache.tokenizer, row.example)[:words]
    ]
    known = int((labels != NO_LABEL).sum())
    mean_entropy = row.teacher_entropy_sum / max(len(row.soft), 1)
    loss = f"{row.teacher_nll_sum / known:.2f} nats a labelled word, " if known else ""
    yield f"  teacher: {loss}entropy {mean_entropy:.2f}"
    shows_kept = not isinstance(row.soft.encoding, Full)
    kept = (row.soft.top_offsets.diff() + row.soft.tail_offsets.diff()).tolist()
    given = ["none" if label == NO_LABEL else names[label] for label in labels[:words].tolist()]
    word_width, label_width = max(4, *map(len, found)), max(5, *map(len, given))
    of_kept = f"{'kept':>6}" if shows_kept else ""
    of_entropy = "" if row.entropy is None else f"{'entropy':>9}"
    yield f"  {'position':>8}  {'word':<{word_width}}  {'label':<{label_width}}{of_kept}{of_entropy}  teacher"
    places = np.flatnonzero(row.example.supervised).tolist()
    for n, (position, word, label) in enumerate(zip(places, found, given, strict=False)):
        believed = "  ".join(f"{names[i]} {weight:.1%}" for i, weight in _best(row, n, top))
        of_kept = f"{kept[n]:>6}" if shows_kept else ""
        of_entropy = "" if row.entropy is None else f"{float(row.entropy[n]):>9.2f}"
        yield f"  {position:>8}  {word:<{word_width}}  {label:<{label_width}}{of_kept}{of_entropy}  {believed}"
    if len(places) > len(found):
        yield f"  ... {len(places) - len(found)} more words"


def _best(row: CachedExample, n: int, top: int) -> list[tuple[int, float]]:
    goal = target(positions_of(row.soft, n, n + 1), served_temperature(row.soft.encoding))
    order = goal.weights.argsort(descending=True, stable=True)[:top]
    return [(int(goal.ids[i]), float(goal.weights[i])) for i in order if goal.weights[i] > 0]


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."
