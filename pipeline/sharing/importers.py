"""Import server responses, and data sets with top log-probabilities (`tables`), as caches."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from pipeline.cache import Cache, Layout, Plan
from pipeline.cache.storage.urls import is_url
from pipeline.cache.writing.place import check_files
from pipeline.capture import LabelledRow, write_cache
from pipeline.config import ImportConfig
from pipeline.errors import BadRowError, MisuseError, PipelineError, SourceError
from pipeline.models import load_tokenizer
from pipeline.progress import size
from pipeline.records import BadRow, Outline, TopK
from pipeline.sharing.distillkit import CONFIG_NAME, PackedLayout, load_layout
from pipeline.sharing.entries import TopEntries, labelled, shift_differences
from pipeline.sharing.responses import needs_template, read_requests, read_responses
from pipeline.sharing.tables import is_table, read_entries, read_parquet
from pipeline.sources.files.loading import redact
from pipeline.tasks import writing_task

logger = logging.getLogger(__name__)

#: Rows and positions from which the shift is inferred, and the standard errors one must win by.
_PROBED_ROWS, _PROBED_POSITIONS = 200, 20_000
_STANDARD_ERRORS = 4.0
_RESPONSE_TOP_K = 20
#: Number of kept classes of a shard, which is held in memory: 200 MB.
_SHARD_ENTRIES = 1 << 24


def run(config: ImportConfig) -> Cache:
    """Run `softlabel import`."""
    tokenizer = load_tokenizer(config.tokenizer)
    return import_responses(
        config.input,
        config.output,
        tokenizer=tokenizer,
        teacher=config.teacher,
        top_k=config.top_k,
        split=config.split,
        position_zero=config.position_zero,
        compression_config=config.compression_config,
        max_length=config.max_length,
        requests=config.requests,
        on_bad_row=config.on_bad_row,
        store_label_logprobs=config.store_label_logprobs,
        overwrite=config.overwrite,
    )


def import_responses(
    files: Iterable[str | Path],
    output: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    teacher: str,
    top_k: int | None = None,
    split: str = "train",
    position_zero: Literal["auto", "empty", "filled"] = "auto",
    compression_config: str | Path | None = None,
    max_length: int | None = None,
    requests: str | Path | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    store_label_logprobs: bool = False,
    overwrite: bool = False,
) -> Cache:
    """Write a `top-k` cache from server responses or rows of top log-probabilities.

    Args:
        files: JSON lines, Parquet files, or directories of Parquet files.
        top_k: number of log-probabilities to store per position; a server must have returned as
            many. Default: 20 for responses, all for tables.
        position_zero: whether entry j belongs to token j (`empty`: the first token has no entry) or
            to token j + 1 (`filled`). `auto` compares the probability of the actual tokens under
            both, over the first rows.
        compression_config: DistillKit's compression configuration; default:
            `compression_config.yaml` next to the first file.
        requests: the input file of a batch, if the responses do not contain their prompts; matched
            by `custom_id`.
        store_label_logprobs: store the log-probability of each actual next token. Responses always
            contain it; a row of a table without it is a bad row.
        on_bad_row: `skip`: leave out failed requests and unusable rows, and list them in
            `reports/bad-rows.tsv`.

    Returns:
        The cache. Residual mass is known at temperature 1 only, so students train at 1.

    Raises:
        SourceError: a row has none of the layouts, or the shift cannot be inferred.
        BadRowError: the log-probabilities of a row are not a distribution.
    """
    opened = _open(
        files,
        tokenizer,
        top_k=top_k,
        position_zero=position_zero,
        compression_config=compression_config,
        requests=requests,
        on_bad_row=on_bad_row,
    )
    rows = (
        _row(where, entry, opened.empty, opened.top_k, tokenizer, split, max_length) for where, entry in opened.entries
    )
    return write_cache(
        _rows(rows, split, on_bad_row),
        output,
        task=writing_task().name,
        tokenizer=tokenizer,
        encoding=TopK(opened.top_k, (1.0,)),
        teacher=teacher,
        max_length=max_length,
        source=opened.kind,
        rows_per_shard=opened.rows_per_shard,
        on_bad_row=on_bad_row,
        store_label_logprobs=store_label_logprobs,
        overwrite=overwrite,
    )


@dataclass(frozen=True, slots=True)
class _Opened:
    """Opened input files, and the settings inferred from their first rows."""

    paths: Sequence[Path]
    entries: Iterator[tuple[str, TopEntries | PipelineError]]
    """All rows, including the first ones."""
    kind: str
    empty: bool
    """Whether entry j belongs to token j."""
    top_k: int
    rows_per_shard: int
    probed: int
    """Number of first rows that were read."""


def _open(
    files: Iterable[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    top_k: int | None,
    position_zero: Literal["auto", "empty", "filled"],
    compression_config: str | Path | None,
    requests: str | Path | None,
    on_bad_row: Literal["stop", "skip"],
) -> _Opened:
    paths = _expand(files)
    entries = _read(paths, tokenizer, _layout(paths, compression_config), read_requests(requests))
    head: list[tuple[str, TopEntries | PipelineError]] = []
    known: list[TopEntries] = []
    positions = 0
    for item in entries:
        head.append(item)
        if isinstance(item[1], TopEntries):
            known.append(item[1])
            positions += len(item[1].input_ids)
        elif on_bad_row == "stop":
            raise item[1]
        if len(known) >= _PROBED_ROWS or positions >= _PROBED_POSITIONS:
            break
    if not head:
        raise SourceError("expected responses, or rows of a table, found none")
    if not known:
        raise SourceError(f"no row is left, every one was set aside; the first: {head[0][1]}")
    empty = tell_shift(known) if position_zero == "auto" else position_zero == "empty"
    first = known[0]
    k = top_k or (_RESPONSE_TOP_K if first.served is not None else first.ids.shape[1])
    return _Opened(
        paths=paths,
        entries=itertools.chain(head, entries),
        kind="responses" if first.served is not None else "top log-probabilities",
        empty=empty,
        top_k=k,
        rows_per_shard=max(1, min(1000, _SHARD_ENTRIES * len(known) // max(1, positions * k))),
        probed=len(head),
    )


def outline(config: ImportConfig) -> Outline:
    """Describe what `run` would do, from the first rows; writes nothing.

    Raises:
        PipelineError: as `run`, except for errors in later rows.
    """
    if is_url(config.output):
        raise MisuseError(f"{redact(config.output)}: import writes to a directory; push it from there")
    found = check_files(Layout(Path(config.output)), Plan, overwrite=config.overwrite)
    if found is not None and Layout(Path(config.output)).manifest.is_file():
        raise MisuseError(f"--output {config.output}: holds a finished cache; use another, or --overwrite")
    tokenizer = load_tokenizer(config.tokenizer)
    opened = _open(
        config.input,
        tokenizer,
        top_k=config.top_k,
        position_zero=config.position_zero,
        compression_config=config.compression_config,
        requests=config.requests,
        on_bad_row=config.on_bad_row,
    )
    rows = (
        _row(where, entry, opened.empty, opened.top_k, tokenizer, config.split, config.max_length)
        for where, entry in itertools.islice(opened.entries, opened.probed)
    )
    good = sum(isinstance(row, LabelledRow) for row in _rows(rows, config.split, config.on_bad_row))
    read = sum(path.stat().st_size for path in opened.paths)
    return (
        ("reads", f"{len(opened.paths):,} files, {size(read)}: {opened.kind}"),
        ("rows", f"{good:,} of the first {opened.probed:,} can be used; the others are not read yet"),
        (
            "position zero",
            "empty: entry j belongs to token j" if opened.empty else "filled: entry j belongs to token j + 1",
        ),
        ("encoding", f"top-k {opened.top_k} over {len(tokenizer):,} classes, of {config.teacher}"),
        ("writes", f"{config.output}: split {config.split}, shards of {opened.rows_per_shard:,} rows"),
    )


def tell_shift(entries: Iterable[TopEntries]) -> bool:
    """Infer whether entry j belongs to token j (True) or to token j + 1 (False).

    Chooses the alignment under which the actual tokens have the higher mean probability.

    Raises:
        SourceError: the means differ by less than 4 paired standard errors.
    """
    parts = [shift_differences(each) for each in entries]
    values = np.concatenate(parts) if parts else np.zeros(0)
    spread = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    lead = float(values.mean()) / spread if len(values) and spread > 0 else 0.0
    if abs(lead) < _STANDARD_ERRORS:
        raise SourceError(
            f"whether log-probabilities belong to their token or to the one after it cannot be inferred from {len(values)} positions; "
            "give --position-zero empty (vLLM, OpenAI) or filled (DistillKit)"
        )
    return lead > 0


def _expand(files: Iterable[str | Path]) -> list[Path]:
    """Replace directories by their Parquet files, sorted by the numbers in their names."""
    paths: list[Path] = []
    for path in map(Path, files):
        inside = sorted(path.glob("*.parquet"), key=_numbers) if path.is_dir() else [path]
        if not inside:
            raise SourceError(f"{path}: expected Parquet files in the directory, found none")
        paths.extend(inside)
    return paths


def _numbers(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _layout(paths: list[Path], given: str | Path | None) -> PackedLayout | None:
    if given is not None:
        return load_layout(Path(given))
    beside = paths[0].parent / CONFIG_NAME if paths else Path(CONFIG_NAME)
    return load_layout(beside) if beside.is_file() else None


def _read(
    paths: Iterable[Path],
    tokenizer: PreTrainedTokenizerBase,
    layout: PackedLayout | None,
    requests: Mapping[str, Mapping[str, Any]] | None,
) -> Iterator[tuple[str, TopEntries | PipelineError]]:
    """Yield location and row; an error instead of a row that cannot be read."""
    templated: set[str] = set()
    for path in paths:
        if path.suffix == ".parquet":
            for number, row in enumerate(read_parquet(path)):
                where = f"{path.name} row {number}"
                yield from _told(where, partial(_of_table, row, tokenizer, layout))
            continue
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        where = f"{path.name} line {number}"
                        yield from _told(where, partial(_parse, line, tokenizer, layout, requests, templated))
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{path}: cannot be read ({error})") from None


def _told(where: str, read: Callable[[], list[TopEntries]]) -> Iterator[tuple[str, TopEntries | PipelineError]]:
    """Yield the rows that `read` returns, or its error, with the location."""
    try:
        found = read()
    except BadRowError as error:
        yield where, BadRowError(f"{where}: {error}")
    except PipelineError as error:
        yield where, SourceError(f"{where}: {error}")
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        pa.ArrowException,
    ) as error:
        said = f"{type(error).__name__}: {error}"
        yield where, SourceError(f"{where}: not a response of a known layout: {said}")
    else:
        several = len(found) > 1
        yield from ((f"{where} choice {i}" if several else where, each) for i, each in enumerate(found))


def _of_table(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, layout: PackedLayout | None
) -> list[TopEntries]:
    return [read_entries(row, tokenizer, layout)]


def _parse(
    line: str,
    tokenizer: PreTrainedTokenizerBase,
    layout: PackedLayout | None,
    requests: Mapping[str, Mapping[str, Any]] | None,
    templated: set[str],
) -> list[TopEntries]:
    content = json.loads(line)
    if not isinstance(content, dict):
        raise SourceError(f"expected an object, found {type(content).__name__}")
    if is_table(content):
        return _of_table(content, tokenizer, layout)
    rows = list(read_responses(content, tokenizer, requests))
    if not templated and needs_template(content):
        templated.add("said")
        logger.warning(
            "answers without prompt_token_ids: their prompts are tokenised with the chat template of %s",
            tokenizer.name_or_path or "--tokenizer",
        )
    return rows


def _row(
    where: str,
    entry: TopEntries | PipelineError,
    empty: bool,
    top_k: int,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    max_length: int | None,
) -> LabelledRow | PipelineError:
    """`labelled` with the length check; returns errors instead of raising them."""
    if isinstance(entry, PipelineError):
        return entry
    if max_length is not None and len(entry.input_ids) > max_length:
        return BadRowError(
            f"{where}: expected at most {max_length} tokens, found {len(entry.input_ids)}; set --max-length"
        )
    try:
        return labelled(entry, empty=empty, top_k=top_k, tokenizer=tokenizer, split=split)
    except BadRowError as error:
        return BadRowError(f"{where}: {error}")


def _rows(
    found: Iterable[LabelledRow | PipelineError], split: str, on_bad_row: Literal["stop", "skip"]
) -> Iterator[LabelledRow | BadRow]:
    """Yield rows, and bad rows with the reason.

    Raises:
        PipelineError: the error of the first bad row, if `on_bad_row` is `stop` or all rows are
            bad.
    """
    good, first = False, None
    for number, row in enumerate(found):
        if isinstance(row, PipelineError):
            if on_bad_row == "stop":
                raise row
            first = first or row
            yield BadRow(split, number, " ".join(str(row).split()))
        else:
            good = True
            yield row
    if not good and first is not None:
        raise SourceError(f"no row is left, every one was set aside; the first: {first}")
