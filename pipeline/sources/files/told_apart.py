"""Recognise what a name given by the user refers to: a mistyped path, a model or a cache."""

from __future__ import annotations

import difflib
from pathlib import Path

from huggingface_hub import constants


def missing_path(name: str) -> str | None:
    """Return an error message for a name that was probably meant as a local path.

    This is the case if a file with a similar name exists, or if its parent directory exists and is
    not the current directory.

    Returns:
        A clause for a message; None: the path exists, or the name may be a hub name.
    """
    path = Path(name).expanduser()
    if path.exists() or "://" in name or not path.parent.is_dir():
        return None
    try:
        beside = sorted(each.name for each in path.parent.iterdir() if not each.name.startswith("."))
    except OSError:  # a directory that may not be listed
        return None
    near = difflib.get_close_matches(path.name, beside, n=1)
    if near:
        return f"no such file or directory; did you mean {path.parent / near[0]}?"
    if path.parent == Path():
        return None
    shown = ", ".join(beside[:5]) + (", ..." if len(beside) > 5 else "")
    return f"no such file or directory; {path.parent} holds {shown or 'nothing'}"


def not_on_the_hub(what: str) -> str:
    """Return a clause for a message: the hub lacks a model or data set, or was not asked."""
    if constants.HF_HUB_OFFLINE:
        return "the hub was not asked (HF_HUB_OFFLINE)"
    return f"the hub has no such {what} either"


def is_cache(path: Path) -> bool:
    """Return whether a directory is a finished cache of soft labels."""
    return (path / "manifest.json").is_file() and (path / "tokenizer").is_dir()


def is_model(path: Path) -> bool:
    """Return whether a directory is an adapter, or a model with its weights."""
    if (path / "adapter_config.json").is_file():
        return True
    weights = (next(path.glob(pattern), None) for pattern in ("*.safetensors", "pytorch_model*.bin"))
    return (path / "config.json").is_file() and any(weights)
