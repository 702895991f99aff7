"""What a directory that a command writes a model to holds already."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

_OF_A_MODEL = ("adapter_*", "model*.safetensors*", "pytorch_model*", "config.json")


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints that a run has left, whole or torn, in no order."""
    return [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def model_files(output: Path) -> list[Path]:
    """The weights and the configuration of a model at the top of a directory."""
    return [path for pattern in _OF_A_MODEL for path in output.glob(pattern)]


def remove(paths: Iterable[Path]) -> None:
    """Remove files and directories."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
