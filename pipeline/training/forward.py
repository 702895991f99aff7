"""Compute the loss inside the student's `forward`, on the innermost model, before it is wrapped.

DDP, FSDP, autocast, PEFT and `torch.compile` then wrap an ordinary forward pass that returns a
loss. Calling the base model around a wrapper made two ranks diverge by 0.04 in three steps without
an error, and ran float32 under bf16. Without `distillation=` the model's own forward runs.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import TrainingError
from pipeline.records import Loss, Predictions, Spans, Target
from pipeline.tasks import Task
from pipeline.tasks.token_heads import decoder_inputs, supervised_hidden
from pipeline.training.batches.collate import target_from_tensors
from pipeline.training.fused import Head, Scores, fused_loss, fused_scores, scores_of
from pipeline.training.losses import distillation_loss
from pipeline.training.scores import score_divergence, score_loss

logger = logging.getLogger(__name__)

#: Two outputs of the matrix: one where cap * tanh(x / cap) is linear, and one where it is
#: saturated.
_SMALL, _LARGE = 2.0**-10, 1e4
#: Largest accepted difference between fused logits and the model's own, relative to the largest
#: logit: the rounding error of the precision.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


#: The entries of a batch that `distillation=` contains, in addition to `counts` and `loss_weights`.
GIVEN = ("supervised", "labels", "weights", "soft_weights", "target", "spans")
#: The fields of `LossTerms` that hold the sum of each term and its divisor.
SUMS = ("hard_sum", "num_hard", "soft_sum", "num_soft", "span_sum", "num_spans")


@dataclass(frozen=True, slots=True)
class _Settings:
    task: Task
    num_classes: int
    loss: Loss
    temperature: float
    transform: tuple[float, float] | None
    """Scale and cap that follow the output matrix; None: the dense path is taken."""


#: Attribute of the new `forward` with the instance's previous `forward`, or None.
_BEFORE = "_before_distillation"


def detach_loss(model: Any) -> None:
    """Undo `attach_loss`, and remove the `forward` that accelerate sets for mixed precision."""
    inner = innermost(model)
    for module in dict.fromkeys((model, inner)):
        original = module.__dict__.pop("_original_forward", None)  # set by accelerate under mixed precision
        if original is not None:
            del module.forward
            if getattr(original, "__func__", None) is not type(module).forward:
                module.forward = original
    function = getattr(inner.__dict__.get("forward"), "__func__", None)
    if function is None or _BEFORE not in function.__dict__:
        return
    before = function.__dict__[_BEFORE]
    del inner.forward
    if before is not None:
        inner.forward = before


def attach_loss(model: Any, *, task: Task, num_classes: int, loss: Loss, temperature: float) -> bool:
    """Replace the innermost `forward` by one that returns losses when given `distillation=`.

    Args:
        model: a student of the task, with or without PEFT adapters, not yet wrapped by anything
            else.

    Returns:
        Whether the fused path is used. It requires a language model whose output embedding is a
        plain linear layer over the base model's hidden states, and whose fused logits equal the
        model's own in a trial on four tokens.
    """
    inner = innermost(model)
    # Unbound, so that a copy of the model (deepcopy, AveragedModel) uses its own weights.
    plain = getattr(inner.forward, "__func__", type(inner).forward)
    transform, reason = _read_transform(inner) if task.fuses_head else (None, "")
    if task.fuses_head and transform is None:
        logger.warning(
            "%s: %s; the loss is taken over dense logits, (positions, %d) at once",
            type(inner).__name__,
            reason,
            num_classes,
        )
    settings = _Settings(task, num_classes, loss, temperature, transform)

    @functools.wraps(type(inner).forward)
    def forward(self: Any, *args: Any, distillation: Mapping[str, Any] | None = None, **inputs: Any) -> Any:
        original = types.MethodType(plain, self)
        if distillation is None:
            return original(*args, **inputs)
        given = {name: value for name, value in inputs.items() if value is not None}  # PEFT fills in its own defaults
        if settings.transform is None:
            logits = task.gather_logits(_Plain(self, original), given, distillation.get("supervised"))
            return _dense(_for_each_teacher(logits, distillation), distillation, settings, scores=not self.training)
        if self.config.is_encoder_decoder:
            plain_model = _Plain(self, original)
            rows = supervised_hidden(plain_model, decoder_inputs(plain_model, given), distillation["supervised"])
        else:
            hidden = self.base_model(**given, use_cache=False).last_hidden_state
            rows = hidden[distillation["supervised"].to(hidden.device)]  # (B, T, H) -> (N, H)
        rows = _for_each_teacher(rows, distillation)
        head = self.get_output_embeddings()
        if hasattr(head.weight, "full_tensor"):  # a DTensor: this rank holds only a part of it
            raise TrainingError(
                "FSDP has put the output embedding into a unit of its own, where the fused loss cannot read it; "
                "name only the layers in transformer_layer_cls_to_wrap, so that it stays in the root unit"
            )
        return _fused(
            rows, Head(head.weight, head.bias, *settings.transform), distillation, settings, scores=not self.training
        )

    forward.__dict__[_BEFORE] = inner.__dict__.get("forward")
    inner.forward = types.MethodType(forward, inner)
    return transform is not None


def _for_each_teacher(rows: Tensor, given: Mapping[str, Any]) -> Tensor:
    """(N, H) -> (teachers * N, H): repeat the positions, which the target has once per teacher."""
    positions = len(given["target"]["offsets"]) - 1
    return rows if positions == len(rows) else rows.repeat(positions // max(len(rows), 1), 1)


def innermost(model: Any) -> Any:
    """Return the `transformers` model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class _Plain(nn.Module):
    """A model with its original forward, as tasks call it; it does not own the parameters."""

    def __init__(self, model: Any, forward: Any) -> None:
        super().__init__()
        self.get_output_embeddings = model.get_output_embeddings
        self.get_input_embeddings = model.get_input_embeddings
        self.prepare_decoder_input_ids_from_labels = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        self.config = model.config
        self.forward = forward


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _fused(
    hidden: Tensor, head: Head, given: Mapping[str, Any], settings: _Settings, *, scores: bool
) -> dict[str, Tensor]:
    target = target_from_tensors(given["target"], settings.num_classes)
    terms = fused_loss(
        hidden, head, target, loss=settings.loss, temperature=settings.temperature, **_counts(given, settings.loss)
    )
    found = _as_dict(terms)
    if scores:
        more = fused_scores(
            hidden, head, target, labels=given["labels"], loss=settings.loss, temperature=settings.temperature
        )
        found.update(_as_dict(more))
    return found


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _dense(logits: Tensor, given: Mapping[str, Any], settings: _Settings, *, scores: bool) -> dict[str, Tensor]:
    target = target_from_tensors(given["target"], settings.num_classes)
    if settings.task.target == "score":
        return _of_scores(logits[:, 0], target, given, settings, scores=scores)
    terms = distillation_loss(
        logits, target, loss=settings.loss, temperature=settings.temperature, **_counts(given, settings.loss)
    )
    found = _as_dict(terms)
    if scores:
        cut = logits[:, : settings.num_classes].float()
        more = scores_of(cut, target, given["labels"], loss=settings.loss, temperature=settings.temperature)
        found.update(_as_dict(more))
    return found


def _of_scores(
    values: Tensor, target: Target, given: Mapping[str, Any], settings: _Settings, *, scores: bool
) -> dict[str, Tensor]:
    counts = {name: value for name, value in _counts(given, settings.loss).items() if "spans" not in name}
    found = _as_dict(score_loss(values, target, loss=settings.loss, temperature=settings.temperature, **counts))
    if scores:
        values = values.float()
        nothing = torch.full_like(values, torch.nan)
        errors = (values - given["labels"].to(values)).square()
        each = score_divergence(values, target, settings.loss.divergence, temperature=settings.temperature)
        found.update(_as_dict(Scores(values, nothing, errors, each)))
    return found


def _counts(given: Mapping[str, Any], loss: Loss) -> dict[str, Any]:
    counts, weights, spans = given.get("counts"), given.get("loss_weights"), given.get("spans")
    if loss.span_weight and spans is None:
        raise TrainingError(
            f"--span-weight {loss.span_weight:g}: expected aligned spans with the batch, found none; leave it out"
        )
    return {
        "labels": given["labels"],
        "weights": given["weights"],
        "soft_weights": given["soft_weights"],
        "loss_weights": None if weights is None else (float(weights[0]), float(weights[1])),
        "num_hard": None if counts is None else counts[0],
        "num_soft": None if counts is None else counts[1],
        "spans": None if spans is None else Spans(**spans),
        "num_spans": None if counts is None or spans is None else counts[2],
    }


def _as_dict(record: Any) -> dict[str, Tensor]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


@torch.no_grad()
def _read_transform(model: Any) -> tuple[tuple[float, float] | None, str]:
    """Find the scale and cap that a model applies to the output of its output matrix, by a trial.

    Returns:
        (scale, cap) and an empty reason; or None and the reason why the logits cannot be computed
        from hidden states and matrix alone.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None, f"the output embedding is a {type(head).__name__}, not a plain linear layer"
    if head.weight.is_meta:
        return None, "the output embedding is not in memory"
    training = model.training
    model.eval()
    try:
        ids = torch.arange(4, device=head.weight.device).remainder(head.weight.shape[0]).unsqueeze(0)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.config.is_encoder_decoder:
            inputs = decoder_inputs(model, {**inputs, "labels": ids})
            hidden = supervised_hidden(model, inputs, torch.ones_like(ids, dtype=torch.bool)).unsqueeze(0)
        else:
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        plain = model(**inputs, use_cache=False).logits  # (1, 4, V')
        scale = _after_head(model, head, inputs, _SMALL) / _SMALL
        limit = _after_head(model, head, inputs, _LARGE)
        cap = math.inf if math.isclose(limit, scale * _LARGE, rel_tol=1e-2) else abs(limit)
        scale = 1.0 if math.isclose(scale, 1.0, rel_tol=1e-3) else scale
        found = Head(head.weight, head.bias, scale, cap).logits(hidden)
        worst = float((found - plain).abs().max() / plain.abs().max().clamp_min(1e-6))
    except Exception as error:  # the model's code may raise anything; use the dense path
        return None, f"a trial of its base model failed ({' '.join(str(error).split())[:120]})"
    finally:
        model.train(training)
    tolerance = _TOLERANCE.get(plain.dtype, 3e-2)
    if not worst <= tolerance:
        return (
            None,
            f"its logits are not its output matrix times its hidden states (they differ by {worst:.2g} of the largest)",
        )
    return (scale, cap), ""


def _after_head(model: Any, head: nn.Module, inputs: Mapping[str, Tensor], value: float) -> float:
    """Return the logit that the model makes of one output value of its matrix."""
    hook = head.register_forward_hook(lambda _module, _args, output: torch.full_like(output, value))
    try:
        return float(model(**inputs, use_cache=False).logits.flatten()[0])
    finally:
        hook.remove()


def kept_scores(batch: Mapping[str, Any], found: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return what is kept of one evaluation batch, as NumPy arrays on the CPU."""
    names = ("predicted", "confidence", "nll", "divergence")
    scores = {name: found[name].double().cpu().numpy() for name in names}
    sums = {name: np.asarray([float(found[name])]) for name in SUMS}
    return {
        **scores,
        **sums,
        "predicted": found["predicted"].cpu().numpy(),
        **{name: batch[name].numpy() for name in ("labels", "weights", "teacher_predicted", "text_bytes")},
        **({"group": batch["target"]["group"].cpu().numpy()} if "group" in batch["target"] else {}),
        # With several teachers the positions are repeated for each; they count once.
        "owner": np.resize(
            np.repeat(batch["source_rows"].numpy(), batch["num_positions"].numpy()), len(batch["labels"])
        ),
    }


def predictions_of(found: Mapping[str, np.ndarray], label_names: tuple[str, ...] | None) -> Predictions:
    """Return the predictions at the positions that count, from concatenated `kept_scores`."""
    known = found["weights"] > 0
    owner = found["owner"][known]
    rows = np.concatenate([[0], np.cumsum(np.diff(owner) != 0)]).astype(np.int64)[: len(owner)]
    text_bytes = np.zeros(int(rows.max(initial=0)) + 1, dtype=np.int64)
    text_bytes[0] = found["text_bytes"].sum()
    return Predictions(
        labels=found["labels"][known],
        predicted=found["predicted"][known],
        confidence=found["confidence"][known],
        nll=found["nll"][known],
        teacher_predicted=found["teacher_predicted"][known],
        rows=rows,
        row_kl=np.zeros(len(text_bytes)),
        row_text_bytes=text_bytes,
        label_names=label_names,
        groups=None if "group" not in found else np.unique(found["group"][known], return_inverse=True)[1],
    )
