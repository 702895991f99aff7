"""Negative log-likelihood at each position, without the (N, V) logits in memory.

`fused_loss` computes its gradients in the forward pass, since the weight of each position is known
there. Here it is not: a span's loss depends on all of its positions, which may be in different
chunks. Therefore the backward pass computes the logits of each chunk again, which costs one more
matrix product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.errors import ContractError, TrainingError
from pipeline.records import NO_LABEL
from pipeline.training.spans.head import Head, matmul_dtype, transform
from pipeline.training.spans.head import chunk_positions as default_positions


def fused_nll(
    hidden: Tensor, head: Head, labels: Tensor, *, num_classes: int, chunk_positions: int | None = None
) -> Tensor:
    """Return the cross-entropy of each position's label, with gradients, without all logits.

    It equals `cross_entropy(head.logits(hidden)[:, :num_classes], labels, reduction="none")`.

    Args:
        hidden: (N, H) float: the inputs of the output matrix.
        labels: (N,) int64, -100 where there is none.
        num_classes: V; rows of the matrix beyond it (padded vocabularies) are ignored.
        chunk_positions: positions per chunk. Default: 32 MB of logits on a CPU, 256 MB on a GPU.

    Returns:
        (N,) nats, float64 if the hidden states are float64, else float32; 0 without a gradient
        where there is no label.

    Raises:
        ContractError: the matrix has fewer rows than there are classes.
        TrainingError: a label outside [0, V).
    """
    if head.weight.shape[0] < num_classes:
        raise ContractError(f"the student has {head.weight.shape[0]} classes, the cache {num_classes}")
    check_labels(labels, num_classes)
    step = chunk_positions or default_positions(num_classes, hidden.device.type)
    settings = (num_classes, step, matmul_dtype(hidden), head.scale, head.cap)
    found: Tensor = _FusedNLL.apply(hidden, head.weight, head.bias, labels, settings)  # type: ignore[no-untyped-call]
    return found


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse hard labels that are not a class.

    Raises:
        TrainingError: names the first such label.
    """
    wrong = (labels != NO_LABEL) & ((labels < 0) | (labels >= num_classes))
    if bool(wrong.any()):
        raise TrainingError(
            f"hard label: expected 0 to {num_classes - 1} (or {NO_LABEL} for none), found {int(labels[wrong][0])}"
        )


class _FusedNLL(torch.autograd.Function):
    """(hidden, weight, bias) -> (N,) nll."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, settings: tuple[Any, ...]
    ) -> Tensor:
        num_classes, step, dtype, scale, cap = settings
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.settings = settings
        nll = torch.zeros(len(labels), dtype=_accumulate(hidden), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix, offset = _part(weight, bias, num_classes, dtype)
            for start in range(0, len(labels), step):
                rows = slice(start, start + step)
                raw = torch.nn.functional.linear(hidden[rows].to(dtype), matrix, offset).to(nll.dtype)  # (C, V)
                logits = transform(raw, scale, cap)
                nll[rows] = torch.nn.functional.cross_entropy(
                    logits, labels[rows], ignore_index=NO_LABEL, reduction="none"
                )
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        num_classes, step, dtype, scale, cap = ctx.settings
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        accumulate = _accumulate(hidden)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=accumulate, device=weight.device) if needs_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=accumulate, device=bias.device) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            matrix, offset = _part(weight, bias, num_classes, dtype)
            for start in range(0, len(labels), step):
                rows = slice(start, start + step)
                inputs = hidden[rows].to(dtype)
                raw = torch.nn.functional.linear(inputs, matrix, offset).to(accumulate)  # (C, V)
                grad = _chunk(raw, labels[rows], outer[rows].to(accumulate), scale, cap)
                if grad_bias is not None:
                    grad_bias[:num_classes] += grad.sum(0)
                narrow = grad.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = narrow @ matrix
                if grad_weight is not None:
                    if dtype == accumulate:
                        grad_weight[:num_classes].addmm_(narrow.t(), inputs)
                    else:
                        grad_weight[:num_classes] += narrow.t() @ inputs
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _chunk(raw: Tensor, labels: Tensor, outer: Tensor, scale: float, cap: float) -> Tensor:
    """Return (C, V): the gradient of sum(outer * nll) with respect to `raw`, the matrix's output.

    It is outer * (softmax - onehot), times the slope of scale and cap.
    """
    logits = transform(raw, scale, cap)
    known = labels != NO_LABEL
    grad = torch.softmax(logits, -1)
    grad[known.nonzero().squeeze(-1), labels[known]] -= 1.0
    grad.mul_(torch.where(known, outer, 0.0).unsqueeze(-1))
    if cap != math.inf:
        grad.mul_((1 - (logits / cap).square()) * scale)
    elif scale != 1.0:
        grad.mul_(scale)
    return grad


def _part(weight: Tensor, bias: Tensor | None, num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return matrix and bias without the rows of a padded vocabulary."""
    return weight[:num_classes].to(dtype), None if bias is None else bias[:num_classes].to(dtype)


def _accumulate(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
