"""Train a byte-level BPE on a cache's text.

Special tokens and chat template are those of another tokenizer.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.cache import Cache
from pipeline.cross_tokenizer.token_bytes import TokenBytes
from pipeline.errors import CacheError, MisuseError, ModelError
from pipeline.progress import Progress
from pipeline.tasks import get_task

logger = logging.getLogger(__name__)

#: The split whose text a tokenizer is trained on.
SPLIT = "train"
_BYTES = 256
_TEXTS = ("text", "text_pair")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
#: Attributes of a tokenizer that are copied besides vocabulary and special tokens.
_SETTINGS = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
    "model_input_names",
    "chat_template",
)


@dataclass
class _Read:
    """Counts of what was read so far."""

    num_rows: int = 0
    num_bytes: int = 0
    num_unknown: int = 0
    """Texts that are left out because the text of a token is not known."""
    last: int = -1
    """The last token of the previous row."""


def train_on_cache(cache: Cache, base: PreTrainedTokenizerBase, size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the texts of a cache's split `train`, a row group at a time.

    The texts of a classifier's cache are the stored ones. Those of a language model's are rebuilt
    from the token ids, row by row; a word may be cut where a long document continues in the next
    row. The stored text is used if the text of a token is not known.

    Args:
        base: as in `train_tokenizer`.

    Raises:
        CacheError: the split does not exist or has no text.
        MisuseError: the size is too small for the 256 bytes and the special tokens.
    """
    _check_size(base, size)
    read = _Read()
    trained = train_tokenizer(base, _texts(cache, read), size)
    if read.num_unknown:
        logger.warning(
            "%s: %d texts are left out of the tokenizer's training: their tokens do not tell what they stand for (unknown tokens)",
            *(cache.where, read.num_unknown),
        )
    if not read.num_bytes:
        raise CacheError(f"{cache.where}: expected text in split {SPLIT!r} to train a tokenizer on, found none")
    found = f"{read.num_bytes} bytes of text in {read.num_rows} rows of {cache.where}, split {SPLIT}"
    if len(trained) < size:
        logger.warning(
            "--tokenizer train:%d: the vocabulary has %d tokens, fewer than asked for: no further pair of tokens is in %s",
            *(size, len(trained), found),
        )
    else:
        logger.info("tokenizer: %d tokens, trained on %s", len(trained), found)
    return trained


def train_tokenizer(base: PreTrainedTokenizerBase, texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Args:
        base: source of the added tokens, their roles, the post-processor and the chat template. If
            it is a byte-level BPE, normalizer and pre-tokenizer are copied too; otherwise texts
            are split as by GPT-2's tokenizer.
        texts: iterated once, and not held in memory.
        size: number of tokens, with added ones. The result has fewer if the texts have no more
            pairs to merge.

    Raises:
        MisuseError: the size is too small for the 256 bytes and the added tokens.
        ModelError: `base` is a slow tokenizer, whose settings cannot be copied.
    """
    _check_size(base, size)
    content: dict[str, Any] = json.loads(_backend(base).to_str())
    added = _added(content)
    special, literal = ([_added_token(item) for item in added if item["special"] == each] for each in (True, False))
    raw = _untrained(content)
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(literal),
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        **{
            name: content["model"][name]
            for name in ("continuing_subword_prefix", "end_of_word_suffix")
            if content["model"].get(name) and _is_byte_level(content)
        },
    )
    raw.train_from_iterator(texts, trainer)
    raw.add_tokens(literal)
    trained = json.loads(raw.to_str())
    trained["post_processor"] = _with_ids(content["post_processor"], raw)
    roles = {
        name: getattr(base, name) for name in base.SPECIAL_TOKENS_ATTRIBUTES if getattr(base, name, None) is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(trained)),
        extra_special_tokens=list(base.extra_special_tokens or []),
        **roles,
        **{name: getattr(base, name) for name in _SETTINGS},
    )


def _check_size(base: PreTrainedTokenizerBase, size: int) -> None:
    added = len(_added(json.loads(_backend(base).to_str())))
    if size < _BYTES + added:
        raise MisuseError(
            f"--tokenizer train:{size}: expected at least {_BYTES + added} tokens: {_BYTES} bytes, and the {added} special and added tokens of "
            f"{base.name_or_path or 'the tokenizer'}"
        )


def _backend(base: PreTrainedTokenizerBase) -> Any:
    backend = getattr(base, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{base.name_or_path or 'the tokenizer'}: is a slow tokenizer, whose special tokens cannot be taken over; give it a tokenizer.json"
        )
    return backend


def _added(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Added tokens by id, without tokens of single bytes, which a byte-level vocabulary has."""
    found = [item for item in content["added_tokens"] if not _BYTE_TOKEN.fullmatch(item["content"])]
    return sorted(found, key=lambda item: int(item["id"]))


def _added_token(item: dict[str, Any]) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(item["content"], **{name: item[name] for name in flags})


def _is_byte_level(content: dict[str, Any]) -> bool:
    """Whether a tokenizer converts texts to bytes before it merges them."""
    before = json.dumps([content["pre_tokenizer"], content["normalizer"]])
    return content["model"]["type"] == "BPE" and '"ByteLevel"' in before


def _untrained(content: dict[str, Any]) -> Tokenizer:
    """An empty byte-level BPE; copies the settings of the base if that is a byte-level BPE too."""
    if not _is_byte_level(content):
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        return raw
    empty = {**content, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    empty["model"] = {**content["model"], "vocab": {}, "merges": []}
    return Tokenizer.from_str(json.dumps(empty))


def _with_ids(part: Any, raw: Tokenizer) -> Any:
    """The post-processor, with token ids replaced by those of the new tokenizer."""
    if part is None:
        return None
    if part["type"] == "Sequence":
        return {**part, "processors": [_with_ids(each, raw) for each in part["processors"]]}
    changed = dict(part)
    for name in ("cls", "sep"):
        if name in part:
            changed[name] = [part[name][0], raw.token_to_id(part[name][0])]
    if "special_tokens" in part:
        changed["special_tokens"] = {
            key: {**item, "ids": [raw.token_to_id(token) for token in item["tokens"]]}
            for key, item in part["special_tokens"].items()
        }
    return changed


def _texts(cache: Cache, read: _Read) -> Iterator[str]:
    """Iterate over the texts of the split by row group, and count them in `read`."""
    contract = cache.manifest.contract
    if get_task(contract.task).other_tokenizers is None:
        raise CacheError(
            f"{cache.where}: students of {contract.task} have the teacher's tokenizer; leave --tokenizer out"
        )
    rebuilt = get_task(contract.task).other_tokenizers == "bytes"
    stored = [name for name in (_TEXTS[:1] if rebuilt else _TEXTS) if name in contract.columns]
    if not stored and not rebuilt:
        raise CacheError(
            f"{cache.where}: a tokenizer is trained on texts, and this cache of {contract.task} holds none; cache again with --store-text"
        )
    rows = cache.dataset(SPLIT)
    codes = TokenBytes.of(cache.tokenizer) if rebuilt else None
    with Progress("text for the tokenizer", len(rows)) as progress:
        for table in rows.tables([*stored, "input_ids", "piece"] if rebuilt else stored):
            read.num_rows += table.num_rows
            packed = contract.tokenization.packing
            found = _stored_texts(table) if codes is None else _rebuilt_texts(table, codes, read, packed=packed)
            for text in found:
                read.num_bytes += len(text.encode("utf-8", "replace"))
                yield text
            progress.update(table.num_rows)


def _stored_texts(table: pa.Table) -> Iterator[str]:
    for column in table.columns:
        yield from (text for text in column.to_pylist() if text)


def _rebuilt_texts(table: pa.Table, codes: TokenBytes, read: _Read, *, packed: bool) -> Iterator[str]:
    """Texts between special tokens, without the text of added tokens.

    A row that continues a document begins with the last token of the previous row, which is left
    out too. In packed rows, continued documents are not marked.
    """
    texts: list[str | None] = table["text"].to_pylist() if "text" in table.column_names else [None] * table.num_rows
    literal = "|".join(re.escape(text) for text in codes.vocabulary.literal.values())
    ids, later = table["input_ids"].combine_chunks(), table["piece"].to_numpy() > 0
    values, offsets = ids.flatten().to_numpy(), np.append(0, np.cumsum(ids.value_lengths().to_numpy()))
    for row, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        goes_on = bool(later[row] or packed) and int(values[start]) == read.last
        read.last = int(values[stop - 1])
        runs = list(codes.runs(values[start + goes_on : stop].astype(np.int64), continues=goes_on))
        text = texts[row]
        if text and not all(run.is_exact for run in runs):
            yield text
            continue
        for run in runs:
            if not run.is_exact:
                read.num_unknown += 1
                continue
            text = run.text.decode(errors="ignore")  # a row may begin or end inside a character
            yield from (part for part in (re.split(literal, text) if literal else [text]) if part)
