"""Check every byte of a cache against its manifest."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from pipeline.cache.format.codec import hash_image, hash_tokens, image_hash
from pipeline.cache.format.contents import check_contents
from pipeline.cache.format.hashes import file_sha256
from pipeline.cache.format.manifest import Layout, Plan, load_manifest, parse, strangers
from pipeline.cache.format.tokenizer_files import tokenizer_problems
from pipeline.cache.reading.shards import REMEDY, check_beside, check_shard_file, open_shard, read_row_group
from pipeline.errors import CacheError, IntegrityError
from pipeline.progress import Progress
from pipeline.records import Contract, Full, Manifest, Sampled, Score, Shard

#: (row number, label or labels) -> the content hash that the row should have.
_Identity: TypeAlias = Callable[[int, "int | tuple[int, ...] | None"], int]


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of verifying a cache: totals and problems."""

    cache_id: str
    shards: int
    rows: int
    positions: int
    bytes: int
    problems: tuple[str, ...]
    broken: tuple[str, ...] = ()
    """Names of the shards that differ from the manifest."""

    def raise_first(self) -> None:
        """Raise `IntegrityError` for the first problem, if there is one."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise IntegrityError(self.problems[0] + more)


def verify(root: Path, *, quick: bool = False) -> Verification:
    """Verify every shard of a cache, its tokenizer and the shard table.

    Checks hashes, sizes, columns, page checksums, counts and value ranges. Row groups are read by
    as many threads as there are processors.

    Args:
        quick: skip the checks that decode data; check only hashes, sizes, columns and the counts in
            the footers.

    Raises:
        CacheError: there is no finished cache.
        IntegrityError: the manifest itself is damaged.
    """
    manifest = load_manifest(root)
    layout = Layout(root)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [_ShardCheck(pool, layout.shard(shard.name), shard, manifest, quick) for shard in manifest.shards]
        broken = {}
        with Progress("verify", sum(shard.bytes for shard in manifest.shards), unit="B") as progress:
            for check in found:
                if (problem := check.problem(progress)) is not None:
                    broken[check.shard.name] = problem
    extra = strangers(layout, manifest)
    problems = [*broken.values(), *(f"{path}: is not in manifest.json; move it out of the cache" for path in extra)]
    try:
        check_beside(root)
    except IntegrityError as error:
        problems.append(str(error))
    problems += tokenizer_problems(layout.tokenizer, manifest.contract)
    return Verification(
        manifest.cache_id,
        len(manifest.shards),
        sum(shard.rows for shard in manifest.shards),
        sum(shard.positions for shard in manifest.shards),
        sum(shard.bytes for shard in manifest.shards),
        tuple(problems),
        tuple(broken),
    )


def drop_broken(root: Path, found: Verification) -> None:
    """Delete broken shards and their receipts, so that the capture can be resumed.

    The manifest is deleted first, so that what is left is an unfinished cache.

    Raises:
        CacheError: the plan of the capture is missing or does not list a broken shard, so that it
            cannot be made again.
    """
    layout = Layout(root)
    if not found.broken:
        return
    planned = {shard.name for shard in parse(Plan, layout.plan).shards} if layout.plan.is_file() else set()
    if not planned.issuperset(found.broken):
        raise CacheError(
            f"{root}: receipts/plan.json does not list {found.broken[0]}, so that no capture could make it again; fetch or import the cache again"
        )
    layout.manifest.unlink()
    for claim in layout.plan.parent.glob("append-*.txt"):  # so that the rows can be appended again
        claim.unlink()
    for name in found.broken:
        layout.receipt(name).unlink(missing_ok=True)
        layout.shard(name).unlink(missing_ok=True)


class _ShardCheck:
    """The checks of one shard, running in a thread pool."""

    def __init__(self, pool: Executor, path: Path, shard: Shard, manifest: Manifest, quick: bool) -> None:
        self.shard = shard
        self._path = path
        self._first: str | None = None
        self._groups: list[Future[tuple[int, int]]] = []
        try:
            check_shard_file(path, shard, manifest)
        except IntegrityError as error:
            self._first = str(error)
            return
        self._sha256 = pool.submit(file_sha256, path)
        if not quick:
            self._groups = [
                pool.submit(_verify_row_group, path, group, manifest) for group in range(len(shard.row_groups))
            ]
        self._quick = quick

    def problem(self, progress: Progress) -> str | None:
        """Return the first problem, or None.

        Row groups are reported before the hash, because their page checksums locate the damage.
        """
        rest, share = self.shard.bytes, self.shard.bytes // max(len(self._groups), 1)
        for group in self._groups:
            wait([group])
            progress.update(share)
            rest -= share
        found = self._problem()
        progress.update(rest)
        return found

    def _problem(self) -> str | None:
        if self._first is not None:
            return self._first
        try:
            counts = [group.result() for group in self._groups]
        except IntegrityError as error:
            return str(error)
        shard, found = self.shard, self._sha256.result()
        if found != shard.sha256:
            return f"{self._path}: sha256 differs from manifest.json (expected {shard.sha256[:12]}..., found {found[:12]}...); {REMEDY}"
        for i, what in enumerate(("positions", "tokens")):
            expected, counted = getattr(shard, what), sum(count[i] for count in counts)
            if not self._quick and expected != counted:
                return f"{self._path}: {what} differ from manifest.json (expected {expected}, found {counted})"
        return None


def _verify_row_group(path: Path, group: int, manifest: Manifest) -> tuple[int, int]:
    """Return the positions and tokens of one row group; raise `IntegrityError` if it is damaged."""
    table = read_row_group(open_shard(path), path, group)
    # Each conversion of `sampled` draws again and rounds again, so the tolerances add up.
    draws = 1 + sum(each.operation.startswith("convert sampled") for each in manifest.ancestry)
    positions = _check_soft_labels(table, manifest.contract, f"{path}: row group {group}", draws=draws)
    return positions, len(_flat(table, "input_ids")) if "input_ids" in table.column_names else table.num_rows


def _check_soft_labels(table: pa.Table, contract: Contract, where: str, *, draws: int) -> int:
    """Check contents, content hashes and kept mass of a row group; return its positions.

    Args:
        draws: how often `sampled` soft labels were sampled; the tolerance of their sum grows with
            it.
    """
    positions = check_contents(table, contract, where)
    _check_hashes(table, where)
    if isinstance(contract.encoding, Full | Score):
        return positions
    encoding = contract.encoding
    values = "top_weights" if isinstance(encoding, Sampled) else "top_logprobs"
    counts, kept = _flat(table, "top_count").astype(np.int64), _flat(table, values)
    weights = kept / encoding.steps if isinstance(encoding, Sampled) else np.exp(kept.astype(np.float32))
    mass = np.add.reduceat(weights, np.cumsum(counts) - counts) if len(counts) else np.zeros(0)
    if isinstance(encoding, Sampled):
        tail_counts, gaps = _flat(table, "tail_count").astype(np.int64), _flat(table, "tail_gaps")
        ends = np.append(0, np.cumsum(tail_counts))
        inner = np.ones(len(gaps), dtype=bool)
        # the first gap of a position is a class id, which may be 0
        inner[ends[:-1][tail_counts > 0]] = False
        _expect(bool((gaps[inner] > 0).all()), where, "tail_gaps: expected each class once")
        slack = draws * (1 / encoding.sample_size + 1 / encoding.steps) + 1e-6
        mass = mass + tail_counts / encoding.sample_size
        _expect(bool((np.abs(mass - 1) <= slack).all()), where, f"weights: expected to sum to 1 +- {slack:.3g}")
    else:
        _expect(bool((mass <= 1.01).all()), where, "top_logprobs: expected a mass of at most 1")
    return positions


def _check_hashes(table: pa.Table, where: str) -> None:
    """Check that the content hash of each row matches its tokens or image, and its label."""
    names = table.column_names
    of_images = "encoded_image" in names
    identity = _identity_of_images(table, where) if of_images else _identity_of_tokens(table)
    name = next((name for name in ("label", "position_labels") if name in names), None)
    labels = [None] * table.num_rows if name is None else table.column(name).to_pylist()
    stored = table.column("content_hash").to_pylist()
    for row, label in enumerate(labels):
        found = identity(row, tuple(label) if isinstance(label, list) else label)
        what = f"the image of row {row} has" if of_images else f"the tokens of row {row} have"
        _expect(found == stored[row], where, f"content_hash: expected {found}, as {what}, found {stored[row]}")


def _identity_of_tokens(table: pa.Table) -> _Identity:
    ids = table.column("input_ids").combine_chunks()
    offsets, tokens = ids.offsets.to_numpy(), ids.values.to_numpy().astype("<i4")
    return lambda row, label: hash_tokens(tokens[offsets[row] : offsets[row + 1]], label)


def _identity_of_images(table: pa.Table, where: str) -> _Identity:
    if "image_sha256" in table.column_names:
        hashes = table.column("image_sha256").to_pylist()
    else:
        images = table.column("encoded_image").combine_chunks().field("bytes")
        hashes = [sha256(image.as_py()).hexdigest() for image in images]
    for row, stored in enumerate(table.column("image_hash").to_pylist()):
        _expect(image_hash(hashes[row]) == stored, where, f"image_hash: expected that of the image of row {row}")
    if "image_view" not in table.column_names:
        return lambda row, label: hash_image(hashes[row], None, label)
    views = table.column("image_view").to_pylist()
    return lambda row, label: hash_image(hashes[row], np.array(views[row], dtype=np.int32), label)


def _flat(table: pa.Table, name: str) -> np.ndarray:
    """Return all values of a list column, concatenated."""
    flat: np.ndarray = table.column(name).combine_chunks().values.to_numpy(zero_copy_only=False)
    return flat


def _expect(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise IntegrityError(f"{where}: {what}")
