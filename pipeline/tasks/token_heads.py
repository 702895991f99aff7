"""What tasks that predict tokens share: metrics, and logits at the supervised positions only."""

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
    """Base of the tasks whose classes are the tokens of the vocabulary."""

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
        """Return the size of the tokenizer's vocabulary, at most the rows of the output embedding.

        Padded embedding rows beyond it stand for no token: their logits are dropped at capture and
        in training.
        """
        inner: Any = model
        head = inner.get_output_embeddings()
        rows = inner.config.get_text_config().vocab_size if head is None else head.weight.shape[0]
        return int(min(len(tokenizer), rows))

    def at_positions(self, logits: Tensor, supervised: Tensor | None) -> Tensor:
        """Select (N, V) logits from (B, T, V) logits."""
        assert supervised is not None
        return logits[supervised]

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Return loss, perplexity, accuracy and calibration.

        Every position has a label. Loss and perplexity are nan if the likelihood of one is missing.
        """
        loss = float(predictions.nll.mean())
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "accuracy": accuracy(predictions.labels, predictions.predicted),
            "ece": expected_calibration_error(predictions.confidence, predictions.predicted == predictions.labels),
        }

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Return (G,) sums of negative log-likelihoods in nats, and (G,) numbers of positions.

        G is the number of groups of rows, or of rows if there are no groups.
        """
        groups = np.arange(len(predictions.row_text_bytes)) if predictions.groups is None else predictions.groups
        owner, count = groups[predictions.rows], 1 + int(groups.max(initial=-1))
        return (
            np.bincount(owner, weights=predictions.nll, minlength=count),
            np.bincount(owner, minlength=count).astype(np.float64),
        )


def supervised_hidden(model: Any, inputs: Mapping[str, Tensor], supervised: Tensor) -> Tensor:
    """Return the (N, H) inputs of the output matrix at the supervised positions, with gradients.

    A forward pre-hook captures them and passes zero positions to the matrix, so no logits are
    computed. This is for models whose base model does not return these hidden states, such as
    encoder-decoders.
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
    """Return the (N, V) logits of one forward pass at the supervised positions.

    The output matrix is applied to these positions only, so the (B, T, V) logits never exist. A
    forward pre-hook on the output embeddings selects the positions. The model's own code applies
    biases, soft-caps and scales, so no architecture is a special case.

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
    """Replace `labels` by the `decoder_input_ids` that the model itself would derive from them.

    For a model without a method for that (NLLB, Blenderbot), the labels are shifted right after the
    start token, as its own `forward` does.

    Raises:
        ModelError: the configuration lacks `decoder_start_token_id` or `pad_token_id`.
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
