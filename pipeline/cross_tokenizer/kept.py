"""Aligned rows, computed once per shard and stored in the user's cache directory."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache import Cache, CacheDataset
from pipeline.cache.format.codec import flat, unpack
from pipeline.cache.storage.commit import write_atomically
from pipeline.cross_tokenizer.chats import ChatRenderer
from pipeline.cross_tokenizer.rows import CachedTokens, Retokenizer, StudentRow, without_alignment
from pipeline.cross_tokenizer.vocabulary_map import NONE
from pipeline.errors import CacheError, ContractError
from pipeline.progress import Progress
from pipeline.records import Contract, RowBlock, Shard, VocabularyMap

logger = logging.getLogger(__name__)

#: Version of the alignment; files of another version are computed again.
_VERSION = 1
#: Columns that are read from a cache.
_READ = ("input_ids", "supervised", "source_row", "piece", "text_bytes", "document_lengths", "text", "messages")
#: List columns of the stored rows; they replace columns of the cache or add to them.
LISTS = ("input_ids", "supervised", "teacher_position", "span", "span_start", "span_stop", "document_lengths")
_TYPES = {
    **{name: pa.list_(pa.int32()) for name in LISTS},
    "supervised": pa.list_(pa.bool_()),
    "text_bytes": pa.int64(),
    "is_rebuilt": pa.bool_(),
    "num_cut": pa.int32(),
    "num_agreeing": pa.int32(),
    "num_dropped": pa.int32(),
    "num_in_other_rows": pa.int32(),
}


@dataclass(frozen=True, slots=True)
class Counts:
    """How the supervised positions of some rows were aligned."""

    rows: int = 0
    not_rebuilt: int = 0
    """Rows whose text cannot be rebuilt from their token ids."""
    positions: int = 0
    """Supervised positions of the student."""
    aligned: int = 0
    agreeing: int = 0
    """Aligned positions whose hard label is the mapped token of the teacher."""
    cut_rows: int = 0
    cut: int = 0
    """Positions beyond the student's maximum length."""
    dropped: int = 0
    """Special tokens of the teacher without a counterpart in the student's vocabulary."""
    in_other_rows: int = 0
    """Positions of turns that the student's chat template renders into another row."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)})


@dataclass(frozen=True)
class KeptRows:
    """The files of aligned rows for one cache and one student."""

    cache: Cache
    vocabulary_map: VocabularyMap
    directory: Path
    max_length: int
    """The student's maximum length in tokens."""

    def path(self, shard: str) -> Path:
        """The file of a shard."""
        return self.directory / f"{Path(shard).stem}.parquet"

    def read(self, shard: str, group: int) -> RowBlock:
        """Read a row group: the columns that replace those of the cache, and additional ones."""
        return unpack_kept(self._table(shard, group=group), self.cache.manifest.contract)

    def _table(self, shard: str, *, group: int | None = None, columns: list[str] | None = None) -> pa.Table:
        """Read one row group of a file, or the whole file.

        Raises:
            CacheError: the file is damaged.
        """
        path = self.path(shard)
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                return file.read(columns=columns) if group is None else file.read_row_group(group, columns=columns)
        except (pa.ArrowException, OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise CacheError(f"{path}: is damaged ({why}); delete it, and the same command makes it again") from None

    def counts(self, shards: tuple[Shard, ...]) -> Counts:
        """The counts of some shards."""
        found = Counts()
        for shard in shards:
            for group in range(len(shard.row_groups)):
                found += _counts(self.read(shard.name, group))
        return found

    def num_tokens(self, shards: tuple[str, ...]) -> np.ndarray:
        """(rows,) int64: the length of each row."""
        tables = [self._table(name, columns=["input_ids"]) for name in shards]
        parts = [np.diff(table["input_ids"].combine_chunks().offsets.to_numpy()) for table in tables]
        return np.concatenate(parts).astype(np.int64)

    def missing(self, shards: tuple[Shard, ...]) -> list[Shard]:
        """Shards without a complete file, in this rank's order; ranks start at different ones."""
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        first = rank * len(shards) // max(world, 1)
        return [shard for shard in (*shards[first:], *shards[:first]) if not self.has(shard)]

    def has(self, shard: Shard) -> bool:
        """Whether the file of a shard is there and complete, with as many rows as the shard.

        A damaged file is logged and counts as missing.
        """
        path = self.path(shard.name)
        try:
            with pq.ParquetFile(path) as file:
                groups = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (pa.ArrowException, OSError):
            groups = ()
        if groups != shard.row_groups:
            logger.warning("%s: is damaged and is computed again", path)
        return groups == shard.row_groups


@dataclass(frozen=True, slots=True)
class Maker:
    """Computes the aligned rows of a student."""

    retokenizer: Retokenizer
    renderer: ChatRenderer | None = None
    """For stored conversations and a student with its own chat template; else None."""

    def make(self, kept: KeptRows, shards: Sequence[Shard]) -> None:
        """Make the files of some shards, except those that another rank has made meanwhile."""
        with Progress("student's tokens", sum(shard.rows for shard in shards)) as progress:
            for shard in shards:
                if not kept.has(shard):
                    write_atomically(kept.path(shard.name), partial(self._write, kept, shard))
                progress.update(shard.rows)

    def _write(self, kept: KeptRows, shard: Shard, path: Path) -> None:
        contract = kept.cache.manifest.contract
        isolated = contract.tokenization.isolate_documents
        names = [name for name in LISTS if isolated or name != "document_lengths"]
        schema = pa.schema({name: kind for name, kind in _TYPES.items() if name in names or name not in LISTS})
        rows = CacheDataset(kept.cache.root, kept.cache.manifest, (shard,), remote=kept.cache.remote)
        columns = [name for name in _READ if name in contract.columns]
        with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in rows.tables(columns):
                block = unpack(table, contract.encoding, contract.num_classes)
                made = self._made(list(_tokens(block)))
                _check_ids(made, kept.vocabulary_map.num_classes)
                agreeing = _agreeing(block, made, kept.vocabulary_map.first_token)
                writer.write_table(_table(made, agreeing, schema))

    def _made(self, rows: list[CachedTokens]) -> list[StudentRow]:
        """The student's rows.

        If the student's template fails on a conversation, the teacher's row is retokenized instead
        and has hard labels only.
        """
        if self.renderer is None:
            return self.retokenizer.rows(rows)
        found = [None if row.messages is None else self.renderer.row(row) for row in rows]
        left = iter(self.retokenizer.rows([row for row, chat in zip(rows, found, strict=True) if chat is None]))
        return [without_alignment(next(left)) if chat is None else chat for chat in found]


def _check_ids(made: list[StudentRow], num_classes: int) -> None:
    """Check that all token ids are below the number of classes of the student's model.

    Raises:
        ContractError: a token id is too large.
    """
    largest = max((int(row.input_ids.max(initial=0)) for row in made), default=0)
    if largest >= num_classes:
        raise ContractError(
            f"the student's tokenizer writes the text with token {largest}: expected tokens below {num_classes}, as its model and the length of its "
            "vocabulary say; resize_token_embeddings gives the model all of them, or take the tokenizer that belongs to it"
        )


def _agreeing(block: RowBlock, made: list[StudentRow], first_token: np.ndarray) -> np.ndarray:
    """(rows,) int32: number of aligned positions whose hard label is the mapped teacher token."""
    ids, supervised = block.lists["input_ids"], block.lists["supervised"]
    found = np.zeros(len(made), dtype=np.int32)
    for i, row in enumerate(made):
        own = slice(int(ids.offsets[i]), int(ids.offsets[i + 1]))
        theirs = ids.values[own][1:][supervised.values[own][:-1].astype(bool)]
        ours = row.input_ids[1:][row.supervised[:-1]]
        aligned = row.teacher_position != NONE
        labels = theirs[row.teacher_position[aligned]]
        known = labels < len(first_token)
        found[i] = int((np.where(known, first_token[np.where(known, labels, 0)], NONE) == ours[aligned]).sum())
    return found


def kept_map(directory: Path, make: Callable[[], VocabularyMap]) -> VocabularyMap:
    """Load the map of vocabularies stored beside the rows, or make and store it."""
    path = directory / "map.npz"
    if path.is_file():
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
                return VocabularyMap(found["first_token"], len(found["is_special"]), found["is_special"])
        except (OSError, ValueError, EOFError, LookupError, zipfile.BadZipFile, zlib.error):
            logger.warning("%s: is damaged and is computed again", path)
    made = make()
    write_atomically(path, partial(_save_map, made))
    return made


def _save_map(mapping: VocabularyMap, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, first_token=mapping.first_token, is_special=mapping.is_special)


def directory_of(cache: Cache, student: str, max_length: int, num_classes: int, root: Path) -> Path:
    """The directory of aligned rows, named by a hash of everything that determines them.

    Args:
        student: identifies the student's tokenizer and chat template.
    """
    decides = f"{_VERSION} {cache.manifest.cache_id} {student} {max_length} {num_classes}"
    key = hashlib.sha256(decides.encode()).hexdigest()[:16]
    return root / "cross-tokenizer" / f"{cache.manifest.cache_id[:16]}-{key}"


def unpack_kept(table: pa.Table, contract: Contract) -> RowBlock:
    """Convert a row group of a stored file to a `RowBlock`."""
    lists, numbers = {}, {}
    for name in table.column_names:
        array = table[name].combine_chunks()
        if pa.types.is_list(array.type):
            lists[name] = flat(array)
        else:
            numbers[name] = array.to_numpy(zero_copy_only=False)
    return RowBlock(contract.encoding, contract.num_classes, lists, numbers, {})


def _counts(block: RowBlock) -> Counts:
    positions, cut = block.lists["teacher_position"].values, block.numbers["num_cut"]
    return Counts(
        rows=len(cut),
        not_rebuilt=int((~block.numbers["is_rebuilt"].astype(bool)).sum()),
        positions=len(positions),
        aligned=int((positions != NONE).sum()),
        agreeing=int(block.numbers["num_agreeing"].sum()),
        cut_rows=int((cut > 0).sum()),
        cut=int(cut.sum()),
        dropped=int(block.numbers["num_dropped"].sum()),
        in_other_rows=int(block.numbers["num_in_other_rows"].sum()),
    )


def _tokens(block: RowBlock) -> Iterator[CachedTokens]:
    texts = block.others["text"].to_pylist() if "text" in block.others else None
    messages = block.others["messages"].to_pylist() if "messages" in block.others else None
    documents = block.lists.get("document_lengths")
    ids, supervised = block.lists["input_ids"], block.lists["supervised"]
    for i in range(len(ids.counts)):
        start, stop = int(ids.offsets[i]), int(ids.offsets[i + 1])
        yield CachedTokens(
            input_ids=ids.values[start:stop],
            supervised=supervised.values[start:stop].astype(bool),
            continues=bool(block.numbers["piece"][i] > 0),
            text_bytes=int(block.numbers["text_bytes"][i]) if "text_bytes" in block.numbers else None,
            text=None if texts is None else texts[i],
            messages=None if messages is None else messages[i],
            source_row=int(block.numbers["source_row"][i]),
            document_lengths=None
            if documents is None
            else documents.values[documents.offsets[i] : documents.offsets[i + 1]],
        )


def _table(rows: list[StudentRow], agreeing: np.ndarray, schema: pa.Schema) -> pa.Table:
    columns: dict[str, Any] = {}
    for field in schema:
        if field.name == "num_agreeing":
            columns[field.name] = pa.array(agreeing, type=field.type)
        elif pa.types.is_list(field.type):
            parts = [getattr(row, field.name) for row in rows]
            offsets = np.append(0, np.cumsum([len(part) for part in parts])).astype(np.int32)
            values = pa.array(np.concatenate(parts), type=field.type.value_type)
            columns[field.name] = pa.ListArray.from_arrays(pa.array(offsets), values)
        else:
            columns[field.name] = pa.array([getattr(row, field.name) for row in rows], type=field.type)
    return pa.table(columns, schema=schema)
