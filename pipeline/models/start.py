"""A student's initial weights: random, layers of its teacher, pretrained, or an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from torch import nn

Start = Literal["random", "layers", "pretrained", "adapter"]

#: The file that `init-student` writes next to the weights.
START = "student-start.json"


def write_start(folder: Path, start: Start) -> None:
    """Record the initial weights of a new student in its directory."""
    (folder / START).write_text(json.dumps({"start": start}) + "\n", encoding="utf-8")


def start_of(model: nn.Module, name: str) -> Start:
    """Return the kind of a student's initial weights, as `init-student` recorded it.

    Without a record, it is inferred from the weights.

    Args:
        name: its directory, or a hub name.
    """
    if hasattr(model, "peft_config"):
        return "adapter"
    try:
        kept = json.loads((Path(name) / START).read_text(encoding="utf-8"))["start"]
    except (OSError, ValueError, KeyError, TypeError):
        kept = None
    if kept == "layers":
        return "layers"
    return "random" if kept == "random" or _untrained(model) else "pretrained"


def _untrained(model: nn.Module) -> bool:
    """Return whether every normalisation layer has its initial weights: one value, zero biases."""
    norms: list[Any] = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    scales = [norm.weight for norm in norms if getattr(norm, "weight", None) is not None]
    shifts = [norm.bias for norm in norms if getattr(norm, "bias", None) is not None]
    made = [bool((scale == scale.flatten()[0]).all()) for scale in scales] + [not bool(shift.any()) for shift in shifts]
    return bool(made) and all(made)
