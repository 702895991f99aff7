"""Write the shards of a new cache from those of other caches: the basis of merge, filter, convert.

The new cache is written by the same protocol as a capture. One row group is in memory at a time.
Shards that do not change are copied as bytes. A stopped run resumes from its receipts; the manifest
is written last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.cache.format.hashes import file_sha256
from pipeline.cache.format.manifest import Layout, Plan, check_same_contract, load_receipt, parse
from pipeline.cache.reading.reader import Cache
from pipeline.cache.reading.shards import REMEDY, open_shard, read_row_group
from pipeline.cache.storage.commit import write_atomically
from pipeline.cache.storage.urls import is_url
from pipeline.cache.views.card import license_beside
from pipeline.cache.writing.build import begin, finish, is_finished, record
from pipeline.cache.writing.claims import finished
from pipeline.cache.writing.place import check_place, clear
from pipeline.cache.writing.writer import regroup, write_row_groups
from pipeline.errors import CacheError, IntegrityError, MisuseError
from pipeline.progress import Progress, size
from pipeline.records import Ancestor, BadRow, Contract, Fidelity, Outline, Receipt, Shard, ShardPlan
from pipeline.softlabels.names import encoding_name
from pipeline.sources.files.loading import redact

#: Function from a piece to the row groups of the new shard; None: the shard does not change.
Change = Callable[["Piece"], Iterable[pa.Table] | None]


@dataclass(frozen=True, slots=True)
class Piece:
    """A shard to be made, and the shard that it is made from."""

    plan: ShardPlan
    cache: Cache
    shard: Shard

    @property
    def path(self) -> Path:
        """Path of the input shard."""
        return Layout(self.cache.root).shard(self.shard.name)

    def row_groups(self) -> Iterator[pa.Table]:
        """Return an iterator over the input's row groups, with page checksums verified."""
        file = open_shard(self.path)
        return (read_row_group(file, self.path, group) for group in range(len(self.shard.row_groups)))


def plan_pieces(caches: Sequence[Cache], splits: Sequence[str], *, as_split: str | None = None) -> list[Piece]:
    """Plan a new shard for each shard of some splits, one cache after another, renumbered.

    The row numbers in the plans count over all caches.
    """
    pieces = []
    for split in splits:
        number = start = 0
        name = as_split or split
        for cache in caches:
            for shard in cache.manifest.split_shards(split):
                plan = ShardPlan(f"{name}-{number:05d}", name, start, start + shard.rows)
                pieces.append(Piece(plan, cache, shard))
                number, start = number + 1, start + shard.rows
    return pieces


def shard_schema(cache: Cache) -> pa.Schema:
    """Return the schema of a cache's shards."""
    first = cache.manifest.shards[0]
    return open_shard(
        Layout(cache.directory("making another from it")).shard(first.name)
    ).schema_arrow.remove_metadata()


def ancestry(caches: Sequence[Cache], operation: str) -> tuple[Ancestor, ...]:
    """Return the ancestors of the caches, then the caches themselves: oldest first, each once."""
    direct = [Ancestor(cache.manifest.cache_id, operation) for cache in caches]
    return tuple(dict.fromkeys([*(each for cache in caches for each in cache.manifest.ancestry), *direct]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """The plan of a new cache made from other caches, before anything is written."""

    name: str
    """Name of the command."""
    output: str | Path
    pieces: Sequence[Piece]
    change: Change
    contract: Contract
    schema: pa.Schema
    ancestors: tuple[Ancestor, ...]
    same_encoding: bool = True
    """Whether the fidelity measured at capture still applies."""
    nothing: str
    """Message for the case that no row is left."""

    @property
    def root(self) -> Path:
        """The output directory."""
        return Path(self.output)

    @property
    def plan(self) -> Plan:
        """The plan of the output's shards."""
        return Plan(self.contract, tuple(piece.plan for piece in self.pieces), ancestry=self.ancestors)

    @property
    def sources(self) -> list[Cache]:
        """The input caches."""
        return list({piece.cache.root: piece.cache for piece in self.pieces}.values())


def check_output(planned: Rewrite, *, overwrite: bool) -> None:
    """Check the location of the new cache, without changing anything.

    Raises:
        MisuseError: it is a URL, or one of the inputs.
        CacheError: an input is behind a URL, or the location holds other files.
        ContractError: the location holds another cache.
    """
    if is_url(str(planned.output)):
        raise MisuseError(
            f"--output {redact(str(planned.output))}: the output has to be a directory; publish it with softlabel push"
        )
    for cache in planned.sources:
        cache.directory("making another from it")
        if cache.root.resolve() == planned.root.resolve():
            raise MisuseError(f"--output {planned.root}: is the cache that is read; use another directory")
    layout = Layout(planned.root)
    found = check_place(layout, planned.plan, overwrite=overwrite)
    if found is not None:
        check_same_contract(planned.plan, found, layout)


def outline(planned: Rewrite, *, overwrite: bool) -> Outline:
    """Describe what `rewrite` would do, after checking its inputs and output. Writes nothing.

    Raises:
        PipelineError: see `check_output`.
    """
    check_output(planned, overwrite=overwrite)
    layout = Layout(planned.root)
    there = 0 if overwrite else sum(finished(layout, piece.plan) is not None for piece in planned.pieces)
    rows, read = (sum(getattr(piece.shard, name) for piece in planned.pieces) for name in ("rows", "bytes"))
    splits = dict.fromkeys(piece.plan.split for piece in planned.pieces)
    return (
        *(("reads", f"{cache.where}: {len(cache.manifest.shards):,} shards") for cache in planned.sources),
        ("rows", f"{rows:,} in {', '.join(splits)}, {size(read)}"),
        ("encoding", f"{encoding_name(planned.contract.encoding)}"),
        (
            "writes",
            f"{planned.root}: {len(planned.pieces):,} shards, {there:,} of them there already; at most {rows:,} rows",
        ),
    )


def rewrite(planned: Rewrite, *, overwrite: bool = False) -> Cache:
    """Write the new cache and return it.

    Raises:
        MisuseError: the output is a URL, or one of the inputs.
        CacheError: no row is left, or the output cannot be written.
        IntegrityError: an input differs from its manifest.
    """
    check_output(planned, overwrite=overwrite)
    root, plan, pieces, sources = planned.root, planned.plan, planned.pieces, planned.sources
    layout = begin(root, plan, sources[0].tokenizer, overwrite=overwrite)
    if is_finished(layout, plan):
        return Cache.open(root)
    bad_rows = {cache.root: _bad_rows(cache) for cache in sources}
    outstanding = [finished(layout, piece.plan) is None for piece in pieces]
    total, left = (
        sum(piece.shard.rows for piece in some) for some in (pieces, itertools.compress(pieces, outstanding))
    )
    progress = Progress(planned.name, total, initial=total - left)
    for number, piece in enumerate(pieces):
        if not outstanding[number]:
            continue
        started = time.monotonic()
        tables = planned.change(piece)
        before_piece = progress.done
        path = layout.shard(piece.plan.name)
        if tables is None:
            made = _copy(piece, path)
        else:
            names, counted = planned.schema.names, _counted(tables, progress)
            made = write_row_groups(
                path, piece.plan, (t.select(names).cast(planned.schema) for t in regroup(counted)), planned.schema
            )
        progress.update(piece.shard.rows - (progress.done - before_piece))  # dropped rows
        before = load_receipt(Layout(piece.cache.root), piece.shard.name)
        receipt = Receipt(
            shard=made,
            plan=piece.plan,
            batches=(),
            device="unknown" if before is None else before.device,
            seconds=round(time.monotonic() - started, 3),
            forward_seconds=0.0,
            bad_rows=bad_rows[piece.cache.root] if _is_first(pieces, number) else (),
            fidelity=_fidelity(sources[0]) if number == 0 and planned.same_encoding else None,
        )
        record(layout, receipt)
    progress.close()
    if not any((load_receipt(layout, piece.plan.name) or _NONE).shard.rows for piece in pieces):
        clear(layout)
        with contextlib.suppress(OSError):  # the directory is not empty
            root.rmdir()
        raise CacheError(planned.nothing)
    licences = {license_beside(cache.root / "README.md") for cache in sources}
    return finish(layout, plan, license=licences.pop() if len(licences) == 1 else None)


def _counted(tables: Iterable[pa.Table], progress: Progress) -> Iterator[pa.Table]:
    for table in tables:
        progress.update(table.num_rows)
        yield table


_NONE = Receipt(Shard("", "", 0, 0, 0, 0, "", ()), ShardPlan("", "", 0, 0), (), "", 0.0, 0.0)


def _copy(piece: Piece, path: Path) -> Shard:
    """Copy a shard's file under its new name."""
    write_atomically(path, lambda temporary: _copy_file(piece.path, temporary))
    shard = piece.shard
    found = file_sha256(path)
    if found != shard.sha256:
        path.unlink()
        raise IntegrityError(
            f"{piece.path}: sha256 differs from manifest.json (expected {shard.sha256[:12]}..., found {found[:12]}...); {REMEDY}"
        )
    return dataclasses.replace(shard, name=piece.plan.name, split=piece.plan.split)


def _copy_file(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _is_first(pieces: Sequence[Piece], number: int) -> bool:
    """Whether a piece is the first of its cache."""
    return all(piece.cache.root != pieces[number].cache.root for piece in pieces[:number])


def _bad_rows(cache: Cache) -> tuple[BadRow, ...]:
    """Return the rows that were set aside at capture, from the cache's report."""
    path = cache.root / "reports" / "bad-rows.tsv"
    if not path.is_file():
        return ()
    parts = [line.split("\t", 2) for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(BadRow(part[0], int(part[1]), part[2]) for part in parts if len(part) == 3 and part[1].isdigit())


def _fidelity(cache: Cache) -> Fidelity | None:
    path = cache.root / "reports" / "fidelity.json"
    return parse(Fidelity, path) if path.is_file() else None
