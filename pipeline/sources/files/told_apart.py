"""What a name that a user has given stands for: a path with a mistake in it or a hub name, a model or a cache."""

from __future__ import annotations

import difflib
from pathlib import Path


def missing_path(name: str) -> str | None:
    """What to say of a name of which nothing was found, if it was meant as a path: its parent is a directory here, or a neighbour is called alike.

    Returns:
        A clause for a message; None: it may as well be a hub name, or it is there.
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


def is_cache(path: Path) -> bool:
    """Whether a directory is a finished cache of soft labels."""
    return (path / "manifest.json").is_file() and (path / "tokenizer").is_dir()


def is_model(path: Path) -> bool:
    """Whether a directory is a model or an adapter, with its weights."""
    if (path / "adapter_config.json").is_file():
        return True
    weights = (next(path.glob(pattern), None) for pattern in ("*.safetensors", "pytorch_model*.bin"))
    return (path / "config.json").is_file() and any(weights)
