"""Open caches for a student: as they are where it has their tokenizer, else in its own tokens."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.cache import Cache
from pipeline.cache.format.codec import unpack_soft
from pipeline.cache.storage.store import default_directory
from pipeline.cross_tokenizer.chats import ChatRenderer
from pipeline.cross_tokenizer.kept import Counts, KeptRows, Maker, directory_of, kept_map
from pipeline.cross_tokenizer.rows import Retokenizer
from pipeline.cross_tokenizer.token_bytes import TokenBytes
from pipeline.cross_tokenizer.view import RetokenizedCache, retokenized, shards_of
from pipeline.cross_tokenizer.vocabulary_map import map_vocabulary
from pipeline.errors import ContractError
from pipeline.models import tokenizer_info
from pipeline.models.adapters import adapter_config, adapter_folder, base_name
from pipeline.models.load import load_config, load_tokenizer, longest_of
from pipeline.records import TokenizerInfo
from pipeline.softlabels import served_temperature, target
from pipeline.softlabels.mapped import map_target
from pipeline.tasks import get_task

logger = logging.getLogger(__name__)

#: Minimum shares: of positions that are aligned, and of aligned positions where the mapped token is
#: the hard label (a warning below these); of aligned positions for an error.
_FEW_ALIGNED, _FEW_AGREEING, _TOO_FEW = 0.5, 0.8, 0.2
#: Number of rows from which the mass that the map moves to special tokens, or loses, is estimated.
_SAMPLE = 256


def cache_for(
    cache: Cache,
    student: str,
    split: str | Sequence[str],
    *,
    trust_remote_code: bool = False,
    base_model: str | None = None,
    cache_dir: str | Path | None = None,
    teaches: bool = True,
) -> Cache:
    """Open a cache for a student; the rows are in the tokens of the student's tokenizer.

    If that is not the teacher's tokenizer, rows are aligned first and a summary is logged.

    Args:
        student: a hub name or a directory.
        split: the split(s) to align now; others are aligned when they are read.
        base_model: base model of an adapter; overrides the one in its configuration.
        cache_dir: where aligned rows are stored; None: `softlabel` in the user's cache directory.
        teaches: whether the student is trained on soft labels; too few aligned positions are then
            an error.

    Raises:
        ContractError: the student's tokenizer cannot be aligned, or `teaches` and too few positions
            are aligned.
    """
    contract = cache.manifest.contract
    if get_task(contract.task).other_tokenizers != "bytes":
        return cache
    tokenizer, config = _of_student(student, trust_remote_code=trust_remote_code, base_model=base_model)
    if tokenizer is None or tokenizer_info(tokenizer).sha256 == contract.tokenizer.sha256:
        return cache
    return open_retokenized(cache, student, tokenizer, config, split, cache_dir=cache_dir, teaches=teaches)


def open_retokenized(
    cache: Cache,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    split: str | Sequence[str],
    *,
    cache_dir: str | Path | None = None,
    teaches: bool = True,
) -> RetokenizedCache:
    """`cache_for` for a tokenizer that differs from the teacher's."""
    if not tokenizer.is_fast:
        raise ContractError(
            f"{name}: its tokenizer is not the cache's, and is a slow one, which does not say what text each token covers; give it a tokenizer.json"
        )
    info = tokenizer_info(tokenizer)
    contract = cache.manifest.contract
    num_classes = min(len(tokenizer), int(config.get_text_config().vocab_size))
    longest = longest_of(config, tokenizer)
    longest = longest if longest < 1 << 24 else 8 * contract.tokenization.max_length
    template = _own_template(cache, name, info)
    root = default_directory() if cache_dir is None else Path(cache_dir)
    directory = directory_of(cache, f"{info.sha256} {template}", longest, num_classes, root)

    @functools.cache
    def both() -> tuple[TokenBytes, TokenBytes]:
        return TokenBytes.of(cache.tokenizer), TokenBytes.of(tokenizer)

    mapping = kept_map(directory, lambda: map_vocabulary(*both(), contract.num_classes, num_classes))

    def prepare() -> Maker:
        retokenizer = Retokenizer(*both(), mapping.first_token, longest)
        if not template:
            return Maker(retokenizer)
        return Maker(retokenizer, ChatRenderer.of(*both(), mapping.first_token, contract.tokenization, longest))

    kept = KeptRows(cache, mapping, directory, longest)
    view = retokenized(cache, kept, prepare, tokenizer, info)
    view.dataset(split)
    _say(view, name, kept.counts(shards_of(cache, split)), split, teaches=teaches)
    return view


def _own_template(cache: Cache, name: str, info: TokenizerInfo) -> str:
    """Hash of the student's chat template; empty without conversations or for equal templates.

    Raises:
        ContractError: the rows are from conversations, which the cache does not store.
    """
    contract, template = cache.manifest.contract, info.chat_template_sha256
    is_chat = contract.tokenization.assistant_turns is not None or "messages" in contract.columns
    is_chat = is_chat or contract.source.columns.messages is not None
    if not is_chat or template is None or template == contract.tokenizer.chat_template_sha256:
        return ""
    if "messages" not in contract.columns:
        raise ContractError(
            f"{name}: has a chat template of its own, and {cache.where} holds conversations only as the teacher's template writes them; "
            "cache again with --store-text"
        )
    return template


def _of_student(name: str, *, trust_remote_code: bool, base_model: str | None) -> tuple[Any, Any]:
    """Load the student's tokenizer and configuration as `load_model` does."""
    adapter, folder = adapter_config(name), adapter_folder(name)
    base = base_name(name, adapter, base_model)
    own = folder is None or (folder / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(name if own else base, trust_remote_code=trust_remote_code)
    return tokenizer, load_config(base, trust_remote_code=trust_remote_code)


def _say(view: RetokenizedCache, name: str, counts: Counts, split: str | Sequence[str], *, teaches: bool) -> None:
    """Log a summary of the alignment in one line, and warnings.

    Raises:
        ContractError: too few positions are aligned to learn from the teacher.
    """
    aligned = counts.aligned / max(counts.positions, 1)
    agreeing = counts.agreeing / max(counts.aligned, 1)
    special, lost = _moved_mass(view, split)
    logger.info(
        "%s: another tokenizer than the cache's: %.1f%% of its %d positions are aligned with the teacher's, the others are trained on hard labels only; "
        "at %.1f%% of the aligned ones the mapped teacher's token is the token of the text; probability mass: %.2g%% to special tokens, %.2g%% lost",
        *(name, 100 * aligned, counts.positions, 100 * agreeing, 100 * special, 100 * lost),
    )
    if counts.not_rebuilt:
        logger.warning(
            "%s: the text of %d of %d rows cannot be rebuilt from their token ids (unknown tokens, or a normalizer): they are trained on hard labels only; "
            "a cache made with --store-text has their texts",
            *(view.where, counts.not_rebuilt, counts.rows),
        )
    if counts.dropped:
        logger.warning(
            "%s: has no counterpart for %d special tokens of the teacher in these rows: they are left out",
            name,
            counts.dropped,
        )
    if counts.in_other_rows:
        logger.warning(
            "%s: its chat template puts the turns of some conversations into several rows, of which the last is kept: %d of %d positions are left out; "
            "a cache made with --assistant-turns each has a row for each turn",
            *(name, counts.in_other_rows, counts.in_other_rows + counts.positions),
        )
    if counts.cut:
        logger.warning(
            "%s: rows have at most %d tokens: %d of %d rows are longer in its tokens and are cut, %d of %d positions are left out",
            *(name, view.manifest.contract.tokenization.max_length, counts.cut_rows, counts.rows, counts.cut),
            counts.cut + counts.positions,
        )
    if not teaches:
        return
    if counts.positions and aligned < _TOO_FEW:
        raise ContractError(
            f"{name}: expected at least {_TOO_FEW:.0%} of its positions to be aligned with the teacher's, found {aligned:.1%} ({counts.aligned} of "
            f"{counts.positions}): the student would learn almost nothing from the soft labels; use a tokenizer with more token boundaries in common"
        )
    if aligned < _FEW_ALIGNED:
        logger.warning(
            "%s: fewer than half of its positions begin where a token of the teacher does: most learn from hard labels alone",
            name,
        )
    if counts.aligned and agreeing < _FEW_AGREEING:
        logger.warning(
            "%s: at %.1f%% of the aligned positions the teacher's token becomes another one than the text has: the student's tokens are longer than "
            "the teacher's, and the mapped target pulls towards their beginnings; see --align spans",
            *(name, 100 * (1 - agreeing)),
        )


def _moved_mass(view: RetokenizedCache, split: str | Sequence[str]) -> tuple[float, float]:
    """Mean probability mass that the map moves to special tokens, and that it drops.

    Per aligned position, over the first `_SAMPLE` rows.
    """
    mapping = view.vocabulary_map
    assert mapping is not None
    special = lost = 0.0
    count = seen = 0
    is_special = torch.from_numpy(mapping.is_special)
    for block in view.as_captured.dataset(split).blocks(_SAMPLE):
        goal = target(unpack_soft(block), served_temperature(block.encoding))
        mapped = map_target(goal, torch.arange(len(goal)), mapping)
        special += float(mapped.weights[is_special[mapped.ids]].sum())
        lost += float(goal.weights.sum() - mapped.weights.sum())
        count, seen = count + len(goal), seen + len(block)
        if seen >= _SAMPLE:
            break
    return special / max(count, 1), max(lost, 0.0) / max(count, 1)
