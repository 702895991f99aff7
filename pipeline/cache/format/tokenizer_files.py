"""Load the tokenizer of a cache from its plain files, without running code from them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cache.format.strict_json import read_json
from pipeline.errors import IntegrityError
from pipeline.models import tokenizer_info
from pipeline.models.processors import SETTINGS, load_cached_processor
from pipeline.records import Contract

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_BYTES = 64 << 20
#: File types that a tokenizer's directory may hold: data, nothing that is executed or unpickled.
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".vocab", ".bpe", ".spm", ".tiktoken", ".md", ".codes")


def check_tokenizer_files(folder: Path) -> None:
    """Refuse links, code, pickles and implausibly large files in a tokenizer's directory.

    Raises:
        IntegrityError: names the file.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise IntegrityError(f"{folder}: expected the tokenizer's files, found no such directory")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = folder / entry.name
        if entry.is_symlink():
            raise IntegrityError(
                f"{path}: is a symbolic link, which may point anywhere; copy the cache's files themselves"
            )
        if entry.is_dir():
            check_tokenizer_files(path)
        elif not entry.is_file() or path.suffix.lower() not in _SUFFIXES:
            raise IntegrityError(f"{path}: expected a tokenizer's data, found another file; move it out of the cache")
        elif entry.stat().st_size > _MOST_BYTES:
            raise IntegrityError(f"{path}: expected at most {_MOST_BYTES >> 20} MB, found {entry.stat().st_size >> 20}")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json", SETTINGS):
        if (folder / name).is_file() and "auto_map" in (read_json(folder / name)[1] or {}):
            raise IntegrityError(
                f"{folder / name}: refers to custom code (auto_map), which is never run for a cache's tokenizer"
            )


def without_code(folder: Path) -> None:
    """Remove custom code from a tokenizer that was just saved, if it has a `tokenizer.json`.

    A tokenizer with a `tokenizer.json` loads without custom code.
    """
    path = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file() or not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if "auto_map" in settings:
        del settings["auto_map"]
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for code in folder.glob("*.py"):
        code.unlink()


def load_cached_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a cache's directory, or the image processor of a cache of images.

    Raises:
        IntegrityError: a file that does not belong there, or one that cannot be loaded.
    """
    from transformers import AutoTokenizer

    check_tokenizer_files(folder)
    try:
        if (folder / SETTINGS).is_file() and not (folder / "tokenizer_config.json").is_file():
            return load_cached_processor(folder)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except BaseException as error:  # Rust's PanicException derives from BaseException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise IntegrityError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    return tokenizer


def tokenizer_problems(folder: Path, contract: Contract) -> list[str]:
    """Compare a tokenizer's files with the manifest and return the problems found."""
    if not folder.is_dir():
        return [f"{folder}: expected the tokenizer's files, found no such directory"]
    try:
        found = tokenizer_info(load_cached_tokenizer(folder)).sha256
    except IntegrityError as error:
        return [str(error)]
    expected = contract.tokenizer.sha256
    return (
        []
        if found == expected
        else [f"{folder}: differs from manifest.json (expected {expected[:12]}..., found {found[:12]}...)"]
    )
