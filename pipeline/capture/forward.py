"""A forward pass of a teacher, and detection of non-finite logits."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.models import LoadedModel, pad_id
from pipeline.records import BadRow, TokenizedExample
from pipeline.tasks import Task

_FEW_CLASSES = 4096


def teacher_logits(
    task: Task,
    teacher: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    num_classes: int,
    length: int | None = None,
) -> Tensor:
    """Run one forward pass; return the (N, V) logits of the supervised positions.

    Args:
        num_classes: V; padded classes beyond it are cut off.
        length: number of tokens to pad rows to. Default: the longest row.
    """
    model = teacher.model
    inputs, supervised = task.collate(examples, pad_id(tokenizer, model), length, processor=tokenizer)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if supervised is not None:
        supervised = supervised.to(model.device)
    with torch.inference_mode():
        logits = task.gather_logits(model, inputs, supervised)
    return logits[:, :num_classes]


def synchronize(logits: Tensor) -> None:
    """Wait for the computation of the logits, so that timing on a GPU is correct."""
    if logits.device.type == "cuda":
        torch.cuda.synchronize(logits.device)


def output_matrix(model: Any, num_classes: int) -> Tensor | None:
    """Return the (V, H) output matrix of a model.

    Without a matrix in memory: the identity if there are few classes, else None.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is not None and weight.dim() == 2 and weight.is_floating_point() and not weight.is_meta:
        matrix: Tensor = weight.detach()[:num_classes]
        return matrix
    return torch.eye(num_classes, device=model.device) if num_classes <= _FEW_CLASSES else None


def device_name(teacher: LoadedModel) -> str:
    """Return the name of the teacher's device, as stored in receipts."""
    device = teacher.model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def broken_rows(examples: Sequence[TokenizedExample], logits: Tensor, split: str) -> dict[int, BadRow]:
    """Return a `BadRow` for each row that has a position with non-finite logits, by row index."""
    peak = logits.amax(-1)
    good = torch.isfinite(peak).tolist()
    if all(good):
        return {}
    found, start = {}, 0
    for i, example in enumerate(examples):
        stop = start + example.num_positions
        if not all(good[start:stop]):
            value = float(peak[start:stop][~torch.isfinite(peak[start:stop])][0])
            found[i] = BadRow(split, example.source_row, f"expected finite logits, found {value}")
        start = stop
    return found


def without(broken: Container[int], examples: Sequence[TokenizedExample], logits: Tensor) -> Tensor:
    """Return the logits of the rows that are not in `broken`."""
    keep = [i not in broken for i, example in enumerate(examples) for _ in range(example.num_positions)]
    return logits[torch.tensor(keep, device=logits.device)]
