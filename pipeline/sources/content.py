"""Hash rows: fingerprints of splits, rows that two splits share, and the choice of held-out rows.

A row is hashed as one line of JSON with the values of its roles. Names of columns and files, and
the division into chunks and batches, have no influence. Parquet files that are read in place are
identified by their footers, so that nothing else of them is read before the first shard.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.progress import track
from pipeline.records import Columns, SourceContents, SplitContents
from pipeline.sources.batches import Row, read_rows
from pipeline.sources.columns import class_names, input_roles, side_roles, used_roles
from pipeline.sources.files.joined import JoinedRows, is_in_place, parts_of
from pipeline.sources.files.parquet import ParquetRows
from pipeline.sources.inputs.images import image_identity
from pipeline.sources.source import Source
from pipeline.sources.values import without_nulls

if TYPE_CHECKING:
    from pipeline.sources.files.joined import Rows

#: Prefix of the fingerprint of a list of files.
_OF_FILES = "files-"

_CHATS = ("messages", "prompt", "completion")
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True, default=repr)


def fingerprints(
    source: Source, ranges: Mapping[str, tuple[int, int]] | None = None, *, by_contents: bool = False
) -> dict[str, str]:
    """Return the SHA-256 of each split over the values and roles of every column that is read.

    Args:
        ranges: split -> the rows `[start, stop)` to hash; default: all rows of all splits.
        by_contents: read the rows of Parquet files too. Otherwise their fingerprint is that of the
            list of files: rows, bytes, footer and tag of each.

    Rows are hashed in order. By contents, equal rows have equal fingerprints, whatever the file
    format, the path and the columns that are not read. The names of a `ClassLabel` are included,
    since its values mean nothing without them.
    """
    ranges = ranges if ranges is not None else {split: (0, len(dataset)) for split, dataset in source.splits.items()}
    found = {}
    for split, rows in ranges.items():
        dataset = source.splits[split]
        roles = {**used_roles(source.columns), **side_roles(dataset, source.columns)}
        found[split] = _fingerprint(dataset, roles, *rows, by_contents=by_contents)
    return found


def is_of_files(fingerprint: str) -> bool:
    """Return whether a fingerprint is that of a list of files, not of their contents."""
    return fingerprint.startswith(_OF_FILES)


@dataclass(frozen=True, slots=True)
class Survey:
    """The results of one pass over the rows of a source."""

    fingerprints: Mapping[str, str]
    """Split -> SHA-256, as from the function `fingerprints`."""
    contents: SourceContents


def survey(source: Source, ranges: Mapping[str, tuple[int, int]], *, by_contents: bool = False) -> Survey:
    """Compute fingerprints and counts of the rows `[start, stop)` of each split in one pass.

    Two rows are equal if all their inputs are equal, whatever their labels and kept columns. Memory
    use is 8 bytes per row. Parquet files are read only with `by_contents`; otherwise their rows are
    counted later, when their shards are written.
    """
    inputs, label = input_roles(source.columns), source.columns.label
    hashes: dict[str, np.ndarray] = {}
    digests: dict[str, str] = {}
    counts: dict[str, SplitContents] = {}
    for split, (start, stop) in ranges.items():
        dataset = source.splits[split]
        roles = {**used_roles(source.columns), **side_roles(dataset, source.columns)}
        if is_in_place(dataset) and not by_contents:
            digests[split] = _fingerprint(dataset, roles, start, stop)
            counts[split] = SplitContents(stop - start, None, None)
            continue
        digest, found = _header(dataset, roles), array("Q")
        unlabelled = blank = 0
        for row in track(
            read_rows(dataset, list(roles.values()), start, stop), f"read {split}", stop - start, stride=64
        ):
            digest.update(_line(_content(row, roles)))
            found.append(_position(row, inputs))
            unlabelled += label is not None and _is_missing(row.get(label))
            blank += any(_is_blank(row.get(name)) for role, name in inputs.items() if role != "prompt")
        digests[split] = digest.hexdigest()
        hashes[split] = np.unique(np.frombuffer(found, dtype=np.uint64)) if found else np.zeros(0, dtype=np.uint64)
        counts[split] = SplitContents(stop - start, None if label is None else unlabelled, blank)
    shared: dict[str, int] | None = {
        f"{one}, {other}": count
        for one, other in itertools.combinations(hashes, 2)
        if (count := len(np.intersect1d(hashes[one], hashes[other], assume_unique=True)))
    }
    return Survey(digests, SourceContents(counts, shared if hashes.keys() == ranges.keys() else None))


def held_out(dataset: Rows, columns: Columns, share: float) -> np.ndarray:
    """Choose the rows of the test split.

    The choice depends only on a row's inputs, or on its list for rankings. So added rows change no
    other row's split, equal inputs stay together, and a larger share includes the rows of a smaller
    one. Rows of files without the label column are held out only if a row with the same inputs in
    another file is, since a test split is for measuring. Rows of a file with the label column are
    held out whether they have a label or not.

    Args:
        share: share of the rows to hold out, in (0, 1).

    Returns:
        (rows,) bool: True for the rows of the test split.
    """
    roles = input_roles(columns) if columns.group is None else {"group": columns.group}  # keeps lists whole
    limit = math.ceil(share * 2.0**64)
    positions = np.fromiter(
        (_position(row, roles) for row in read_rows(dataset, list(roles.values()))),
        dtype=np.uint64,
        count=len(dataset),
    )
    below = positions <= np.uint64(limit - 1)
    label = columns.label
    if not isinstance(dataset, JoinedRows) or label is None or label not in dataset.column_names:
        return below
    labelled = np.concatenate(
        [np.full(len(part), dataset.holds(i, label), dtype=np.bool_) for i, part in enumerate(dataset.parts)]
    )
    return np.isin(positions, positions[labelled & below])


def _fingerprint(dataset: Rows, roles: dict[str, str], start: int, stop: int, *, by_contents: bool = False) -> str:
    digest = _header(dataset, roles)
    pieces = dataset.pieces(start, stop) if isinstance(dataset, JoinedRows) else [(0, start, stop)]
    of_files = False
    for i, first, last in pieces:
        part = parts_of(dataset)[i]
        if isinstance(part, ParquetRows) and not by_contents:
            digest.update(_line([list(roles.values()), *part.identity(first, last)]))
            of_files = True
            continue
        before = start if i == 0 or not isinstance(dataset, JoinedRows) else dataset.bounds[i] + first
        for row in read_rows(dataset, list(roles.values()), before, before + last - first):
            digest.update(_line(_content(row, roles)))
    return (_OF_FILES if of_files else "") + digest.hexdigest()


def _header(dataset: Rows, roles: dict[str, str]) -> hashlib._Hash:
    names = {role: list(class_names(dataset.features.get(name))) or None for role, name in roles.items()}
    return hashlib.sha256(_line(names.items()))


def _is_missing(label: object) -> bool:
    return label is None or label == -1 or label != label


def _is_blank(value: object) -> bool:
    return isinstance(value, str) and bool(value) and value.isspace()


def _position(row: Row, roles: dict[str, str]) -> int:
    """Hash the row to an integer in [0, 2^64), which decides whether it is held out."""
    digest = hashlib.blake2b(_line(_content(row, roles)), digest_size=8, person=b"hold-out")
    return int.from_bytes(digest.digest(), "big")


def _content(row: Row, roles: dict[str, str]) -> list[object]:
    """Return the values of a row in a form that does not depend on the layout of its structs."""
    return [_value(role, row.get(name)) for role, name in roles.items()]


def _value(role: str, value: object) -> object:
    if role == "image":
        return image_identity(value)
    return _chat(value) if role in _CHATS else without_nulls(value)


def _chat(value: object) -> object:
    return [_turn(turn) if isinstance(turn, dict) else turn for turn in value] if isinstance(value, list) else value


def _turn(turn: dict[str, object]) -> list[object]:
    rest = {key: without_nulls(item) for key, item in turn.items() if key not in ("role", "content")}
    rest = {key: item for key, item in rest.items() if item not in (None, "", [], {})}
    return [turn.get("role"), without_nulls(turn.get("content")), "tool_calls" in rest, *([rest] if rest else [])]


def _line(values: Iterable[object]) -> bytes:
    return _JSON.encode(list(values)).encode("utf-8", "surrogatepass") + b"\n"
