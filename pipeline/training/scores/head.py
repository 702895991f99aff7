"""Standardise the last layer of a model of scores while it is trained.

An optimizer changes every weight by about the learning rate per step, whatever the unit of the
data. For a score of 150 the bias would need thousands of steps, and a score of 0.01 is less than
the first step. Therefore the layer's weights W, b compute standardised scores, and its output is
mean + std (W h + b). Weights that are saved or loaded meanwhile are std W and std b + mean, which
give the same scores without this module.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.records import Scale

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-4
#: Attribute of a model whose last layer is standardised.
_ACTIVE = "_scores_are_standardized"


@contextmanager
def standardized(model: Any, scale: Scale | None) -> Iterator[None]:
    """Standardise the last layer of a model within the context; `scale` None does nothing."""
    if scale is None or getattr(model, _ACTIVE, False):  # an evaluation during training
        yield
        return
    head = _standardize(model, scale)
    if head is None:
        logger.warning(
            "%s: found no linear layer that gives its scores: it is trained in the unit of the data (mean %s, standard deviation %s), which is slow where that is far from 0 and 1",
            *(type(model).__name__, _listed(scale.mean), _listed(scale.std)),
        )
    setattr(model, _ACTIVE, True)
    try:
        yield
    finally:
        delattr(model, _ACTIVE)
        if head is not None:
            head.restore()


@dataclass(frozen=True, slots=True)
class _StandardHead:
    """A layer whose weights compute standardised scores until `restore`."""

    layer: nn.Linear
    mean: Tensor
    """(outputs,) float32; 0 if the layer has no bias."""
    std: Tensor
    """(outputs,) float32."""
    hooks: tuple[Any, ...]

    def restore(self) -> None:
        """Fold mean and standard deviation into the weights, and remove the hooks."""
        for hook in self.hooks:
            hook.remove()
        with torch.no_grad():
            for name, value in _folded(self.layer.state_dict(), "", self.mean, self.std).items():
                getattr(self.layer, name).copy_(value)


def _standardize(model: Any, learnt: Scale) -> _StandardHead | None:
    """Make the last layer of a model return mean + std times the output of its weights.

    If its bias is 0, the layer was never trained: its weights are kept, and the scores start near
    the mean. Otherwise the weights are changed, so that the scores stay the same.

    Returns:
        None if no linear layer gives the model's scores.
    """
    layer: Any = _last_layer(model, len(learnt.mean))
    if layer is None:
        return None
    device = layer.weight.device
    shift = torch.as_tensor(learnt.mean, dtype=torch.float32, device=device)
    if layer.bias is None:
        if (np.abs(learnt.mean) > learnt.std).any():
            logger.warning(
                "%s: its last layer has no bias, and the scores are far from 0 (mean %s, standard deviation %s): training is slow or fails; subtract the mean from the data, or "
                "use a --divergence of lists",
                *(type(model).__name__, _listed(learnt.mean), _listed(learnt.std)),
            )
        shift = torch.zeros_like(shift)
    scale = torch.as_tensor(learnt.std, dtype=torch.float32, device=device)
    if layer.bias is None or bool(layer.bias.any()):
        with torch.no_grad():
            for name, value in _unfolded(layer.state_dict(), "", shift, scale).items():
                getattr(layer, name).copy_(value)

    def forward(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.float() * scale.to(output.device) + shift.to(output.device)

    def save(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        state.update(_folded(state, prefix, shift, scale))

    def load(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state.update(_unfolded(state, prefix, shift, scale))

    hooks = (
        layer.register_forward_hook(forward),
        layer.register_state_dict_post_hook(save),
        layer.register_load_state_dict_pre_hook(load),
    )
    return _StandardHead(layer, shift, scale, hooks)


def _folded(state: Mapping[str, Tensor], prefix: str, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Convert standardised weights to weights that give the scores themselves."""
    weight = state[f"{prefix}weight"]
    found = {f"{prefix}weight": (weight.float() * std.to(weight.device)[:, None]).to(weight.dtype)}
    if f"{prefix}bias" in state:
        bias = state[f"{prefix}bias"]
        found[f"{prefix}bias"] = (bias.float() * std.to(bias.device) + mean.to(bias.device)).to(bias.dtype)
    return found


def _unfolded(state: Mapping[str, Tensor], prefix: str, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Invert `_folded`."""
    found = {}
    if f"{prefix}weight" in state:
        weight = state[f"{prefix}weight"]
        found[f"{prefix}weight"] = (weight.float() / std.to(weight.device)[:, None]).to(weight.dtype)
    if f"{prefix}bias" in state:
        bias = state[f"{prefix}bias"]
        found[f"{prefix}bias"] = ((bias.float() - mean.to(bias.device)) / std.to(bias.device)).to(bias.dtype)
    return found


def _listed(values: np.ndarray) -> str:
    return ", ".join(f"{value:.3g}" for value in values.tolist())


@torch.no_grad()
def _last_layer(model: Any, outputs: int) -> nn.Linear | None:
    """Find the linear layer that computes a model's scores, by a trial on four tokens.

    If the layer is applied to all tokens, its output at one of them is the scores.
    """
    made: list[tuple[nn.Linear, Tensor]] = []
    layers = [each for each in model.modules() if type(each) is nn.Linear and each.out_features == outputs]
    hooks = [each.register_forward_hook(lambda layer, _, output: made.append((layer, output))) for each in layers]
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        ids = torch.arange(1, 5, device=device).unsqueeze(0)
        scores = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.flatten().float()
    except Exception:  # the model's code may raise anything; train it without standardisation
        return None
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    for layer, output in reversed(made):
        apart = (output.float().reshape(-1, outputs) - scores).abs().amax(-1).min()
        if scores.shape == (outputs,) and bool(apart <= _TOLERANCE * (1 + scores.abs().max())):
            return layer
    return None
