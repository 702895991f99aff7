"""Semantic checks of a manifest from an untrusted source.

Hashes prove that a manifest is undamaged, not that its values are possible.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from pipeline.cache.format.schema import cache_schema, describe
from pipeline.errors import PipelineError
from pipeline.records import Contract, Full, Manifest, Sampled, Score, Shard, TopK
from pipeline.tasks import Task, get_task

#: Shard names are file names, not paths, so that a manifest cannot refer to files outside the
#: cache.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: Upper bounds that no cache reaches. Larger values would cause overflows later.
_MOST_CLASSES, _MOST = 1 << 24, 1 << 48
_KEPT = re.compile(r"null|bool|string|u?int(8|16|32|64)|halffloat|float|double")
_MOST_STRING = 10_000


def contract_problem(contract: Contract) -> str | None:
    """Return the first problem of a contract, as `path: expected ..., found ...`, or None."""
    return next(_of_contract(contract), None)


def manifest_problem(manifest: Manifest) -> str | None:
    """Return the first problem of a contract and its shard table, or None."""
    problem = contract_problem(manifest.contract)
    others = (_of_shards(manifest.shards), _of_moments(manifest), _of_rest(manifest))
    return problem or next(itertools.chain(*others), None)


def _of_contract(contract: Contract) -> Iterator[str]:
    for where, text in _strings(dataclasses.asdict(contract)):
        if len(text) > _MOST_STRING or any(unicodedata.category(c) == "Cc" for c in text):
            yield f"{where}: expected text without control characters, found {text[:60]!r}"
    try:
        task = get_task(contract.task)
    except PipelineError as error:
        yield str(error)
        return
    classes, encoding = contract.num_classes, contract.encoding
    is_score = task.target == "score"
    if isinstance(encoding, Score) != is_score:
        yield f"encoding: expected {'score' if is_score else 'one of distributions'}, as the task {task.name} needs, found {encoding.kind}"
    if not (1 if is_score else 2) <= classes <= _MOST_CLASSES:
        yield f"num_classes: expected {1 if is_score else 2} to {_MOST_CLASSES}, found {classes}"
    names = contract.label_names
    if task.names == "positions":
        if classes != (1 if is_score else 2):
            yield f"num_classes: expected {'1 for a score' if is_score else '2 for each of several labels'}, found {classes}"
        if not names or len(names) > _MOST_CLASSES:
            yield f"label_names: expected 1 to {_MOST_CLASSES}, found {names if names is None else len(names)}"
    elif task.names == "places":
        if classes != contract.tokenization.max_length or names is None or len(names) != 2:
            yield f"num_classes: expected {contract.tokenization.max_length} (the places of the longest row) and the names of two positions, found {classes} and {names}"
    elif (None if names is None else len(names)) != (None if task.names is None else classes):
        yield f"label_names: expected {'none' if task.names is None else classes}, found {names if names is None else len(names)}"
    vocabulary, fewest = contract.tokenizer.vocabulary_size, 1 if task.reads != "images" else 0
    if not fewest <= vocabulary <= _MOST_CLASSES:
        yield f"tokenizer.vocabulary_size: expected {fewest} to {_MOST_CLASSES}, found {vocabulary}"
    if task.predicts_tokens and classes > vocabulary:
        yield f"num_classes: expected at most the {vocabulary} tokens of the tokenizer, found {classes}"
    for name, token in contract.tokenizer.special_ids.items():
        if not 0 <= token < vocabulary:
            yield f"tokenizer.special_ids.{name}: expected 0 to {vocabulary - 1}, found {token}"
    if not 0 <= contract.tokenization.max_length <= _MOST_CLASSES:
        yield f"tokenization.max_length: expected 0 to {_MOST_CLASSES}, found {contract.tokenization.max_length}"
    if contract.tokenization.num_choices != (classes if task.reads == "choices" else None):
        yield f"tokenization.num_choices: expected {classes if task.reads == 'choices' else 'none'}, found {contract.tokenization.num_choices}"
    if not isinstance(encoding, Full | Sampled | Score):
        grid = encoding.temperatures
        if not grid or len(grid) > 64 or not all(0 < t < math.inf for t in grid):
            yield f"encoding.temperatures: expected 1 to 64 above 0, found {grid[:8]}"
        if not (encoding.k >= 1 if isinstance(encoding, TopK) else 0 < encoding.p <= 1):
            yield f"encoding: expected k of at least 1 or p in (0, 1], found {encoding}"
    yield from _of_columns(contract, task)


def _of_columns(contract: Contract, task: Task) -> Iterator[str]:
    """Check that the columns are those of task and encoding; kept columns have plain types."""
    found = contract.columns
    schema = cache_schema(
        contract.encoding,
        contract.num_classes,
        labels=task.label_source,
        marks_positions=task.marks_positions,
        token_type_ids="token_type_ids" in found,
        text="text" in found,
        text_pair="text_pair" in found,
        words=task.other_tokenizers == "words" and "position_words" in found,
        images=task.reads == "images",
        views=contract.tokenization.views is not None,
        image_files="image_sha256" in found,
        messages=task.continues_prompts and "messages" in found,
        groups=contract.source.columns.group is not None,
        documents=task.reads == "choices" or (task.label_source == "tokens" and "document_lengths" in found),
        choices=task.reads == "choices" and "choice_texts" in found,
        entropy="entropy" in found,
        label_logprobs=task.label_source == "tokens" and "label_logprobs" in found,
    )
    expected = describe(schema)
    for name, kind in expected.items():
        if name not in found:
            yield f"columns: expected {name}, as encoding {contract.encoding.kind} has, found {', '.join(found)}; cache again with this release"
        elif found[name] != kind:
            yield f"columns.{name}: expected {kind}, found {found[name]}"
    for name, kind in found.items():
        if name not in expected and (not _KEPT.fullmatch(kind) or not name):
            yield f"columns.{name}: expected a text, a number or a boolean, found {kind}"


def _of_shards(shards: tuple[Shard, ...]) -> Iterator[str]:
    seen: set[str] = set()
    if not shards:
        yield "shards: expected at least one, found none"
    for i, shard in enumerate(shards):
        for what, text in (("name", shard.name), ("split", shard.split)):
            if not NAME.fullmatch(text):
                yield f"shards.{i}: shard {what}: expected a plain file name, found {text[:200]!r}"
        if shard.name.lower() in seen:
            yield f"shards.{i}: shard name: expected each once, found {shard.name!r} again"
        seen.add(shard.name.lower())
        for hashed in (shard.sha256, shard.footer_sha256):
            if not _SHA256.fullmatch(hashed):
                yield f"shards.{i}: sha256: expected 64 hexadecimal digits, found {hashed[:80]!r}"
        for name in ("rows", "positions", "tokens", "bytes"):
            if not 1 <= getattr(shard, name) < _MOST:
                yield f"shards.{i}.{name}: expected at least 1, found {getattr(shard, name)}"
        if min(shard.row_groups, default=0) < 1 or sum(shard.row_groups) != shard.rows:
            yield f"shards.{i}.row_groups: expected {shard.rows} rows in all, found {sum(shard.row_groups)}"


def _of_moments(manifest: Manifest) -> Iterator[str]:
    """Check that each shard of a cache of scores has the moments of each output."""
    is_score = isinstance(manifest.contract.encoding, Score)
    outputs = len(manifest.contract.label_names or ()) if is_score else 0
    for i, shard in enumerate(manifest.shards):
        if len(shard.moments) != outputs:
            yield f"shards.{i}.moments: expected {outputs}, found {len(shard.moments)}"
        for each in shard.moments:
            if each.count != shard.rows or not math.isfinite(each.mean) or not 0 <= each.deviation < math.inf:
                yield f"shards.{i}.moments: expected finite ones of {shard.rows} rows, found {each}"


def _of_rest(manifest: Manifest) -> Iterator[str]:
    for i, each in enumerate(manifest.ancestry):
        if not _SHA256.fullmatch(each.cache_id):
            yield f"ancestry.{i}.cache_id: expected a SHA-256, found {each.cache_id[:80]!r}"
        if len(each.operation) > 2000 or not each.operation.isprintable():
            yield f"ancestry.{i}.operation: expected a line of at most 2,000 characters"
    if not 0 <= manifest.bad_rows < _MOST:
        yield f"bad_rows: expected at least 0, found {manifest.bad_rows}"


def _strings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(str(key), f"{where}.{key[:40]}" if where else str(key)[:40])
            yield from _strings(item, f"{where}.{key[:40]}" if where else str(key)[:40])
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _strings(item, f"{where}.{i}")
