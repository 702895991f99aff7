"""What models that predict tokens share: the output matrix, applied to the supervised positions only, and their metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ModelError
from pipeline.metrics import accuracy, expected_calibration_error, perplexity
from pipeline.records import NO_LABEL, Encoding, LabelNames, OtherTokenizers, Predictions, Sampled
from pipeline.tasks.defaults import TaskDefaults


@dataclass(frozen=True, slots=True)
class TokenTask(TaskDefaults):
    """What tasks whose classes are tokens share."""

    marks_positions: bool = True
    names: LabelNames | None = None
    predicts_tokens: bool = True
    takes_token_types: bool = False
    stores_text: bool = False
    other_tokenizers: OtherTokenizers | None = None
    default_encoding: Encoding = Sampled()
    default_temperature: float = 1.0
    main_metric: str = "loss"
    higher_is_better: bool = False

    def num_classes(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """The tokenizer's vocabulary.

        Padded embedding rows beyond it stand for no token: their logits are cut off, at capture and
        in training.
        """
        inner: Any = model
        head = inner.get_output_embeddings()
        rows = inner.config.get_text_config().vocab_size if head is None else head.weight.shape[0]
        return int(min(len(tokenizer), rows))

    def at_positions(self, logits: Tensor, supervised: Tensor | None) -> Tensor:
        """(B, T, V) -> (N, V)."""
        assert supervised is not None
        return logits[supervised]

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Loss, perplexity, accuracy and calibration.

        Every position has a label; nan where a cache does not know its likelihood.
        """
        loss = float(predictions.nll.mean())
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "accuracy": accuracy(predictions.labels, predictions.predicted),
            "ece": expected_calibration_error(predictions.confidence, predictions.predicted == predictions.labels),
        }

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """(G,) sums of negative log-likelihoods, nats, and (G,) positions, of each group of rows or else of each row."""
        groups = np.arange(len(predictions.row_text_bytes)) if predictions.groups is None else predictions.groups
        owner, count = groups[predictions.rows], 1 + int(groups.max(initial=-1))
        return (
            np.bincount(owner, weights=predictions.nll, minlength=count),
            np.bincount(owner, minlength=count).astype(np.float64),
        )


def supervised_hidden(model: Any, inputs: Mapping[str, Tensor], supervised: Tensor) -> Tensor:
    """(N, H) what the output matrix reads at the supervised positions, with gradients; the matrix itself is not applied.

    Taken by a forward pre-hook that hands no position on, for models whose base model does not give
    these hidden states: encoder-decoders.
    """
    found: list[Tensor] = []

    def take(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found.append(args[0][supervised.to(args[0].device)])
        return (args[0][:1, :0], *args[1:])  # (1, 0, H)

    hook = model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return found[0]


def supervised_logits(
    model: nn.Module, inputs: Mapping[str, Tensor], supervised: Tensor | None, **settings: Any
) -> Tensor:
    """(N, V) logits of one forward pass; the output matrix sees the supervised positions only, so (B, T, V) never exists.

    A forward pre-hook on the output embeddings selects them; the model's own code does the rest
    (biases, soft-caps, scales), so no architecture is a special case.

    Args:
        supervised: (B, T) bool.
        settings: more arguments of the model's `forward`.
    """
    assert supervised is not None
    head: Any = model.get_output_embeddings()  # type: ignore[operator]

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][supervised.to(args[0].device)].unsqueeze(0), *args[1:])  # (B, T, H) -> (1, N, H)

    if head is None:
        logits: Tensor = model(**inputs, **settings).logits
        return logits[supervised.to(logits.device)]
    hook = head.register_forward_pre_hook(select)
    try:
        logits = model(**inputs, **settings).logits  # (1, N, V)
    finally:
        hook.remove()
    return logits[0]


def decoder_inputs(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `forward` takes in place of `labels`: the tokens that the decoder reads, as the model itself makes them of the targets.

    A model without a method for that (NLLB, Blenderbot) reads the targets behind its start token,
    as its own `forward` does.

    Raises:
        ModelError: the model names no start token.
    """
    found = dict(inputs)
    labels = found.pop("labels")
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        return {**found, "decoder_input_ids": shift(labels=labels)}
    start, padding = model.config.decoder_start_token_id, model.config.pad_token_id
    if start is None or padding is None:
        raise ModelError(
            f"{type(model).__name__}: its configuration has no decoder_start_token_id or no pad_token_id; set both in config.json"
        )
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return {**found, "decoder_input_ids": shifted.masked_fill(shifted == NO_LABEL, padding)}
