"""Files of saved models: find, remove and convert them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_OF_A_MODEL = ("adapter_*", "model*.safetensors*", "pytorch_model*", "config.json")


def checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints that a run has left, complete or not, in no order."""
    return [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def model_files(output: Path) -> list[Path]:
    """Return the files of weights and configuration at the top of a directory."""
    return [path for pattern in _OF_A_MODEL for path in output.glob(pattern)]


def trained_length(name: str) -> int | None:
    """Return the tokens of the longest row that a model was trained on, or None if unknown.

    The directories of students and teachers that this package trained record it.
    """
    for file in ("distillation.json", "metrics.json"):  # of a student, of a teacher
        try:
            found = json.loads((Path(name).expanduser() / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        length = found.get("max_length") if isinstance(found, dict) else None
        if isinstance(length, int) and length > 0:
            return length
    return None


def round_weights(model: Any, dtype: torch.dtype) -> None:
    """Round the parameters to another dtype in place, keeping their own dtype.

    The model then computes what a file in the other dtype will give.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(parameter.to(dtype))


def cast_weights(folder: Path, dtype: torch.dtype) -> None:
    """Convert the weights of a saved model to another dtype, and record it in the configuration."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        return
    total = 0
    for path in files:
        tensors = load_file(path)
        cast = {name: each.to(dtype) if each.is_floating_point() else each for name, each in tensors.items()}
        total += sum(each.nbytes for each in cast.values())
        save_file(cast, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"]["total_size"] = total
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def remove(paths: Iterable[Path]) -> None:
    """Remove files and directories."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
