"""manifest.json, receipts and plan: typed records <-> JSON, and where each file stands in a cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.cache.schema import FORMAT_VERSION, soft_columns
from pipeline.errors import CacheError, ContractError, IntegrityError, MisuseError
from pipeline.records import AlignmentProbe, Ancestor, Contract, Manifest, Receipt, Shard, ShardPlan

Record = TypeVar("Record")

#: Shard names are file names, not paths: nothing in a manifest can point out of the cache.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each file of a cache stands."""

    root: Path

    @property
    def manifest(self) -> Path:
        """Written last."""
        return self.root / "manifest.json"

    @property
    def plan(self) -> Path:
        """Written first: the contract and the shards to be made."""
        return self.root / "receipts" / "plan.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's files."""
        return self.root / "tokenizer"

    @property
    def data(self) -> Path:
        """The shards."""
        return self.root / "data"

    def shard(self, name: str) -> Path:
        """A shard's Parquet file."""
        return self.data / f"{name}.parquet"

    def receipt(self, name: str) -> Path:
        """A finished shard's receipt."""
        return self.root / "receipts" / f"{name}.json"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a capture sets out to make, fixed before its first shard."""

    contract: Contract
    shards: tuple[ShardPlan, ...]
    ancestry: tuple[Ancestor, ...] = ()
    """The caches that it is made from, where it is made from caches."""


def dump(record: Any) -> str:
    """A record as indented JSON; equal records give equal text. JSON has no NaN: it becomes null."""
    return json.dumps(_without_nan(_plain(record)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def parse(kind: type[Record], path: Path) -> Record:
    """Read a record back.

    Raises:
        IntegrityError: the file is not JSON of this kind.
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except MisuseError as error:
        raise IntegrityError(f"{path}: not a {kind.__name__.lower()} of this format: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise IntegrityError(f"{path}: not a {kind.__name__.lower()} of this format: {where}: {first['msg']}") from None


def make_manifest(
    contract: Contract,
    shards: tuple[Shard, ...],
    *,
    bad_rows: int,
    probe: AlignmentProbe | None,
    ancestry: tuple[Ancestor, ...] = (),
) -> Manifest:
    """The manifest of finished shards, with its cache_id."""
    return Manifest(FORMAT_VERSION, cache_id(contract, shards), contract, shards, bad_rows, probe, ancestry)


def cache_id(contract: Contract, shards: tuple[Shard, ...]) -> str:
    """SHA-256 over the contract and the shard table, as canonical JSON."""
    content = [_plain(contract), [_plain(shard) for shard in shards]]
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_manifest(root: Path) -> Manifest:
    """Read and check manifest.json.

    Raises:
        CacheError: no cache there, or one that was not finished.
        IntegrityError: another format version, an id that does not fit, a name that is no file name.
    """
    layout = Layout(root)
    if not layout.manifest.is_file():
        if layout.plan.is_file():
            raise CacheError(
                f'{root}: the capture was not finished; run the same "softlabel cache-logits" again to go on with it'
            )
        raise CacheError(f"{root}: no cache here (manifest.json is missing)")
    version = _format_version(layout.manifest)
    if version != FORMAT_VERSION:
        raise IntegrityError(
            f"{layout.manifest}: format version: expected {FORMAT_VERSION}, found {version}; use the release that wrote it"
        )
    manifest = parse(Manifest, layout.manifest)
    for shard in manifest.shards:
        if not NAME.fullmatch(shard.name):
            raise IntegrityError(f"{layout.manifest}: shard name: expected a plain file name, found {shard.name!r}")
    contract = manifest.contract
    for name in soft_columns(contract.encoding, contract.num_classes):
        if name not in contract.columns:
            raise IntegrityError(
                f"{layout.manifest}: columns: expected {name}, as encoding {contract.encoding.kind} has, found {', '.join(contract.columns)}; cache again with this release"
            )
    expected = cache_id(manifest.contract, manifest.shards)
    if manifest.cache_id != expected:
        raise IntegrityError(
            f"{layout.manifest}: cache_id: expected {expected[:12]}..., found {manifest.cache_id[:12]}...; the manifest was edited"
        )
    return manifest


def load_receipt(layout: Layout, name: str) -> Receipt | None:
    """The receipt of a finished shard, or None."""
    path = layout.receipt(name)
    return parse(Receipt, path) if path.is_file() else None


def differences(expected: Any, found: Any, where: str = "") -> Iterator[str]:
    """Each setting in which two records differ, as `path: expected ..., found ...`."""
    if dataclasses.is_dataclass(expected) or dataclasses.is_dataclass(found):
        expected, found = _plain(expected), _plain(found)
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*expected, *found]):
            yield from differences(expected.get(key), found.get(key), f"{where}.{key}" if where else str(key))
    elif expected != found:
        yield f"{where}: expected {_short(expected)}, found {_short(found)}"


def check_same_contract(expected: Plan, found: Plan, root: Path) -> None:
    """Refuse to mix two captures.

    Raises:
        ContractError: names the first setting that differs.
    """
    first = next(differences(found, expected), None)
    if first is not None:
        raise ContractError(
            f"{root}: holds another capture: {first}; use another --output, the same settings as before, or --overwrite to start anew"
        )


def _plain(record: Any) -> Any:
    return TypeAdapter(type(record)).dump_python(record, mode="json") if dataclasses.is_dataclass(record) else record


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _format_version(path: Path) -> Any:
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path}: not JSON: {error}") from None
    return content.get("format_version") if isinstance(content, dict) else None
