"""manifest.json, receipts and plan as typed records, and the paths of a cache's files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.cache.format.sanity import NAME, manifest_problem
from pipeline.cache.format.schema import FORMAT_VERSION
from pipeline.cache.format.strict_json import read_json
from pipeline.errors import CacheError, ContractError, IntegrityError, MisuseError
from pipeline.records import AlignmentProbe, Ancestor, Contract, Manifest, Receipt, Shard, ShardPlan
from pipeline.sources.files.told_apart import is_model, missing_path

if TYPE_CHECKING:
    from pipeline.cache.storage.outbox import Outbox

Record = TypeVar("Record")

#: Fields added after the first release. They are omitted if empty, so that the bytes and ids of
#: older manifests and run records stay the same.
_ADDED = frozenset(
    {
        "label_map",
        "base_model",
        "assistant_turns",
        "chat_template_kwargs",
        "truncation_side",
        "unlabelled_sources",
        "judge",
        "server",
        "own_settings",
        "span_weight",
        "span_temperature",
        "own_tokenizer",
        "tokenizer_notes",
        "bytes_per_second",
        "bytes_per_row",
        "span_loss",
        "words",
        "moments",
        "masking",
        "group",
        "image",
        "views",
        "choices",
        "num_choices",
        "stride",
    }
)

__all__ = [
    "NAME",
    "AnyPlan",
    "Layout",
    "Names",
    "Plan",
    "cache_id",
    "check_same_contract",
    "differences",
    "dump",
    "load_manifest",
    "load_receipt",
    "make_manifest",
    "parse",
]


@dataclass(frozen=True, slots=True)
class Names:
    """Names of a sharded job and its result in messages, and of the files that the job owns.

    Different kinds of jobs use different file names, so that no job resumes or deletes the files of
    another.
    """

    result: str = "cache"
    work: str = "capture"
    end: str = "manifest.json"
    plan: str = "plan.json"
    shards: str = "data"


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of a cache's files."""

    root: Path
    outbox: Outbox | None = None
    """For a cache that is written to a URL: sends files from `root`, a local staging directory, to
    the URL."""
    names: Names = Names()

    @property
    def name(self) -> str:
        """The cache's directory or URL, for messages."""
        return self.outbox.url if self.outbox is not None else str(self.root)

    @property
    def manifest(self) -> Path:
        """The manifest, which is written last."""
        return self.root / self.names.end

    @property
    def plan(self) -> Path:
        """The plan, which is written first: the contract and the shards to be made."""
        return self.root / "receipts" / self.names.plan

    @property
    def tokenizer(self) -> Path:
        """The directory of the tokenizer's files."""
        return self.root / "tokenizer"

    @property
    def data(self) -> Path:
        """The directory of the shards."""
        return self.root / self.names.shards

    def shard(self, name: str) -> Path:
        """Return the path of a shard's Parquet file."""
        return self.data / f"{name}.parquet"

    def receipt(self, name: str) -> Path:
        """Return the path of a finished shard's receipt."""
        return self.root / "receipts" / f"{name}.json"


@dataclass(frozen=True, slots=True)
class Parent:
    """The finished cache that new rows are appended to."""

    cache_id: str
    rows: Mapping[str, int]
    """Split -> the number of source rows that the parent covers: the first source row to append."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a capture will make, fixed before its first shard."""

    contract: Contract
    shards: tuple[ShardPlan, ...]
    parent: Parent | None = None
    ancestry: tuple[Ancestor, ...] = ()
    """The caches that this one is derived from, if any."""


class AnyPlan(Protocol):
    """The plan of a sharded job: a capture, or another job with its own type of contract."""

    @property
    def contract(self) -> Any:
        """Everything that determines the contents of the shards."""

    @property
    def shards(self) -> tuple[ShardPlan, ...]:
        """The shards to be made."""


def dump(record: Any) -> str:
    """Serialize a record as indented JSON; equal records give equal text.

    NaN and infinity become null.
    """
    return json.dumps(_without_nan(_plain(record)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """Return a cached `TypeAdapter`; creating one takes milliseconds."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def parse(kind: type[Record], path: Path) -> Record:
    """Read a record from a JSON file.

    Raises:
        IntegrityError: the file is not JSON of this record type.
    """
    return _parse(kind, path, read_json(path)[0])


def _parse(kind: type[Record], path: Path, data: bytes) -> Record:
    try:
        found: Record = _adapter(kind).validate_json(data)
        return found
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
    """Return the manifest of finished shards, with its cache_id."""
    manifest = Manifest(FORMAT_VERSION, cache_id(contract, shards), contract, shards, bad_rows, probe, ancestry)
    return dataclasses.replace(manifest, sha256=_own_sha256(manifest))


def cache_id(contract: Contract, shards: tuple[Shard, ...]) -> str:
    """Return the SHA-256 of the contract and the shard table as canonical JSON."""
    content = [_plain(contract), [_plain(shard) for shard in shards]]
    return _sha256(content)


def _own_sha256(manifest: Manifest) -> str:
    return _sha256(_without_nan(_plain(dataclasses.replace(manifest, sha256=""))))


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_manifest(root: Path) -> Manifest:
    """Read and check manifest.json.

    Raises:
        CacheError: there is no cache, or it is unfinished.
        IntegrityError: the format version, an id or a name is wrong, or the file was changed.
    """
    layout = Layout(root)
    if not layout.manifest.is_file() and not layout.manifest.is_symlink():
        if layout.plan.is_file():
            raise CacheError(
                f'{root}: the capture was not finished; run the same "softlabel cache-logits" again to resume it'
            )
        if is_model(root):
            raise CacheError(
                f"{root}: is a model directory, expected a cache (manifest.json); a model is given with --teacher, --student or --model"
            )
        raise CacheError(f"{root}: no cache here ({missing_path(str(root)) or 'manifest.json is missing'})")
    data, content = read_json(layout.manifest)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise IntegrityError(
            f"{layout.manifest}: format version: expected {FORMAT_VERSION}, found {_short(version)}; use the release that wrote it"
        )
    manifest = _parse(Manifest, layout.manifest, data)
    problem = manifest_problem(manifest)
    if problem is not None:
        raise IntegrityError(f"{layout.manifest}: {problem}")
    expected = cache_id(manifest.contract, manifest.shards)
    if manifest.cache_id != expected:
        raise IntegrityError(
            f"{layout.manifest}: cache_id: expected {expected[:12]}..., found {manifest.cache_id[:12]}...; the manifest was edited, or a later release wrote it"
        )
    if manifest.sha256 != _own_sha256(manifest):
        raise IntegrityError(
            f"{layout.manifest}: sha256: expected {_own_sha256(manifest)[:12]}..., found {manifest.sha256[:12] or 'none'}...; it was damaged or edited, or another release "
            "wrote it: fetch it again, or cache again"
        )
    if data != dump(manifest).encode():
        raise IntegrityError(
            f"{layout.manifest}: its text is not what a capture writes; it was damaged or edited, or a later release wrote it"
        )
    return manifest


def strangers(layout: Layout, manifest: Manifest) -> list[Path]:
    """Return the Parquet files that neither the manifest nor an append in progress lists."""
    listed = {shard.name for shard in manifest.shards}
    if layout.plan.is_file():
        plan = parse(Plan, layout.plan)
        if plan.parent is not None and plan.parent.cache_id == manifest.cache_id:
            listed |= {shard.name for shard in plan.shards}
    return [path for path in sorted(layout.data.glob("*.parquet")) if path.stem not in listed]


def load_receipt(layout: Layout, name: str) -> Receipt | None:
    """Return the receipt of a finished shard, or None.

    Raises:
        IntegrityError: the file is not a receipt, or it belongs to another shard.
    """
    path = layout.receipt(name)
    if not path.is_file():
        return None
    receipt = parse(Receipt, path)
    if receipt.plan.name != name or receipt.shard.name != name:
        raise IntegrityError(f"{path}: expected the receipt of {name}, found that of {receipt.shard.name[:80]!r}")
    return receipt


def differences(expected: Any, found: Any, where: str = "") -> Iterator[str]:
    """Yield each setting in which two records differ, as `path: expected ..., found ...`."""
    if dataclasses.is_dataclass(expected) or dataclasses.is_dataclass(found):
        expected, found = _plain(expected), _plain(found)
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*expected, *found]):
            yield from differences(expected.get(key), found.get(key), f"{where}.{key}" if where else str(key))
    elif expected != found:
        yield f"{where}: expected {_short(expected)}, found {_short(found)}"


def check_same_contract(expected: AnyPlan, found: AnyPlan, layout: Layout, *, work: str = "capture") -> None:
    """Check that two plans of a capture, or of another sharded job, are equal.

    Raises:
        ContractError: names the first setting that differs.
    """
    first = next(differences(found, expected), None)
    if first is not None:
        grown = work == "capture" and first.startswith(
            ("contract.source.fingerprints", "contract.source.rows", "shards")
        )
        hint = ", --append where the data set has only gained rows" if grown else ""
        here = layout.outbox is None and not layout.manifest.is_file()  # behind a URL, receipts may not be fetched
        receipts = {path for path in layout.plan.parent.glob("[!.]*.json") if path != layout.plan}
        raise ContractError(
            f"{layout.name}: holds another {work}: {first}; use another --output, the same settings as before{hint}, or --overwrite to start over"
            + (" (no shard of it is finished)" if here and not receipts else "")
        )


def _plain(record: Any) -> Any:
    if not dataclasses.is_dataclass(record):
        return record
    return _without_added(_adapter(type(record)).dump_python(record, mode="json"))


def _without_added(value: Any) -> Any:
    """Omit the fields of `_ADDED` that are empty; a stride of 0 is a setting."""
    if isinstance(value, dict):
        return {
            key: _without_added(item)
            for key, item in value.items()
            if item or key not in _ADDED or (key == "stride" and item is not None)
        }
    return [_without_added(item) for item in value] if isinstance(value, list) else value


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
