"""A cache from what others have: responses of vLLM and OpenAI-compatible servers, and data sets of top log-probabilities (`tables`)."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.cache import Cache
from pipeline.capture import LabelledRow, top_soft_labels, write_cache
from pipeline.config import ImportConfig
from pipeline.errors import BadRowError, EncodingError, PipelineError, SourceError
from pipeline.models import load_tokenizer
from pipeline.records import TeacherScores, TopK
from pipeline.sharing.distillkit import CONFIG_NAME, PackedLayout, load_layout
from pipeline.sharing.responses import Response, read_response
from pipeline.sharing.tables import TopEntries, is_table, labelled, read_entries, read_parquet, shift_differences

#: Rows, or positions, from which the shift is told, and the standard errors by which one must win.
_PROBED_ROWS, _PROBED_POSITIONS = 200, 20_000
_STANDARD_ERRORS = 4.0
_RESPONSE_TOP_K = 20
#: Kept classes of a shard, which is held in memory: 200 MB.
_SHARD_ENTRIES = 1 << 24


def run(config: ImportConfig) -> Cache:
    """`softlabel import`."""
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
    overwrite: bool = False,
) -> Cache:
    """Write a `top-k` cache from a server's responses, or from rows that hold top log-probabilities.

    Args:
        files: JSON lines, Parquet files, or directories of Parquet files.
        top_k: how many log-probabilities to keep of each position; a server must have returned as many. Default: 20 of a response, all of a table.
        position_zero: whether entry j speaks of token j (`empty`: the first has nothing before it), or of the token after it (`filled`).
            `auto` compares the weight of the token that does follow under both, over the first rows.
        compression_config: how DistillKit has packed; default: `compression_config.yaml` beside the first file.

    Returns:
        The cache. Residual mass is known at temperature 1 only, so students train at 1.

    Raises:
        SourceError: a row that is in none of the layouts, or a shift that cannot be told.
        BadRowError: a row whose log-probabilities are no distribution.
    """
    paths = _expand(files)
    entries = _read(paths, tokenizer, _layout(paths, compression_config))
    head: list[tuple[str, Response | TopEntries]] = []
    positions = 0
    for item in entries:
        head.append(item)
        positions += len(item[1].input_ids)
        if len(head) >= _PROBED_ROWS or positions >= _PROBED_POSITIONS:
            break
    if not head:
        raise SourceError("expected responses, or rows of a table, found none")
    empty = tell_shift([entry for _, entry in head]) if position_zero == "auto" else position_zero == "empty"
    first = head[0][1]
    k = top_k or (_RESPONSE_TOP_K if isinstance(first, Response) else first.ids.shape[1])
    rows = (_row(where, entry, empty, k, tokenizer, split) for where, entry in itertools.chain(head, entries))
    return write_cache(
        rows,
        output,
        task="causal-lm",
        tokenizer=tokenizer,
        encoding=TopK(k, (1.0,)),
        teacher=teacher,
        max_length=max_length,
        source="responses" if isinstance(first, Response) else "top log-probabilities",
        rows_per_shard=max(1, min(1000, _SHARD_ENTRIES * len(head) // (positions * k))),
        overwrite=overwrite,
    )


def tell_shift(entries: Iterable[Response | TopEntries]) -> bool:
    """Whether entry j speaks of token j (True), or of token j + 1: the one under which the tokens that follow weigh more.

    Raises:
        SourceError: neither wins by 4 paired standard errors.
    """
    parts = [shift_differences(each) if isinstance(each, TopEntries) else _differences(each) for each in entries]
    values = np.concatenate(parts) if parts else np.zeros(0)
    spread = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    lead = float(values.mean()) / spread if len(values) and spread > 0 else 0.0
    if abs(lead) < _STANDARD_ERRORS:
        raise SourceError(
            f"whether log-probabilities belong to their token or to the one after it cannot be told from {len(values)} positions; "
            "say it with --position-zero empty (vLLM, OpenAI) or filled (DistillKit)"
        )
    return lead > 0


def _differences(response: Response) -> np.ndarray:
    """(M,): by how much the token at an entry's place weighs more in it than the token after that."""
    differences = []
    for j, entry in enumerate(response.entries):
        at = response.first + j
        if entry and 0 < at < len(response.input_ids) - 1:
            here, after = (math.exp(entry.get(response.input_ids[i], -math.inf)) for i in (at, at + 1))
            differences.append(here - after)
    return np.asarray(differences, dtype=np.float64)


def _expand(files: Iterable[str | Path]) -> list[Path]:
    """Directories become their Parquet files, in the order of the numbers in their names."""
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
    paths: Iterable[Path], tokenizer: PreTrainedTokenizerBase, layout: PackedLayout | None
) -> Iterator[tuple[str, Response | TopEntries]]:
    for path in paths:
        if path.suffix == ".parquet":
            for number, row in enumerate(read_parquet(path)):
                where = f"{path.name} row {number}"
                yield where, _told(where, partial(read_entries, row, tokenizer, layout))
            continue
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        where = f"{path.name} line {number}"
                        yield where, _told(where, partial(_parse, line, tokenizer, layout))
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{path}: cannot be read ({error})") from None


def _told(where: str, read: Callable[[], Response | TopEntries]) -> Response | TopEntries:
    """What is read, or an error that says where."""
    try:
        return read()
    except PipelineError as error:
        raise SourceError(f"{where}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{where}: not a response of a known layout: {type(error).__name__}: {error}") from None


def _parse(line: str, tokenizer: PreTrainedTokenizerBase, layout: PackedLayout | None) -> Response | TopEntries:
    content = json.loads(line)
    if not isinstance(content, dict):
        raise SourceError(f"expected an object, found {type(content).__name__}")
    return read_entries(content, tokenizer, layout) if is_table(content) else read_response(content, tokenizer)


def _row(
    where: str, entry: Response | TopEntries, empty: bool, top_k: int, tokenizer: PreTrainedTokenizerBase, split: str
) -> LabelledRow:
    """Entries moved to the position that made them; a position without an entry is not supervised."""
    if isinstance(entry, Response):
        return _of_response(where, entry, empty, top_k, tokenizer, split)
    try:
        return labelled(entry, empty=empty, top_k=top_k, tokenizer=tokenizer, split=split)
    except BadRowError as error:
        raise BadRowError(f"{where}: {error}") from None


def _of_response(
    where: str, response: Response, empty: bool, top_k: int, tokenizer: PreTrainedTokenizerBase, split: str
) -> LabelledRow:
    ids = response.input_ids
    supervised = np.zeros(len(ids), dtype=bool)
    kept_ids: list[list[int]] = []
    kept: list[list[float]] = []
    nll: list[float] = []
    for j, entry in enumerate(response.entries):
        position = response.first + j - (1 if empty else 0)
        if not entry or not 0 <= position < len(ids) - 1:
            continue
        best = sorted(entry.items(), key=lambda item: -item[1])[:top_k]
        if len(best) < top_k:
            raise BadRowError(
                f"{where}: position {position}: expected {top_k} log-probabilities, found {len(best)}; set --top-k to what the server returned"
            )
        supervised[position] = True
        kept_ids.append([token for token, _ in best])
        kept.append([value for _, value in best])
        nll.append(-entry.get(ids[position + 1], math.nan))
    if not kept:
        raise BadRowError(f"{where}: no position has log-probabilities")
    try:
        soft = top_soft_labels(kept_ids, kept, len(tokenizer), k=top_k)
    except EncodingError as error:
        raise BadRowError(f"{where}: {error}") from None
    predicted = [token for token, known in zip(ids[1:], supervised, strict=False) if known]
    text = str(tokenizer.decode(predicted, skip_special_tokens=True))
    scores = TeacherScores(torch.tensor(nll), torch.full((len(nll),), math.nan))
    return LabelledRow(
        ids, soft_labels=soft, scores=scores, supervised=supervised, text_bytes=len(text.encode()), split=split
    )
