"""The output matrix of models that predict tokens, applied to the supervised positions only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


def vocabulary_size(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's vocabulary. Padded embedding rows beyond it stand for no token: their logits are cut off, at capture and in training."""
    inner: Any = model
    head = inner.get_output_embeddings()
    rows = inner.config.get_text_config().vocab_size if head is None else head.weight.shape[0]
    return int(min(len(tokenizer), rows))


def supervised_hidden(model: Any, inputs: Mapping[str, Tensor], supervised: Tensor) -> Tensor:
    """(N, H) what the output matrix reads at the supervised positions, with gradients; the matrix itself is not applied.

    Taken by a forward pre-hook that hands no position on, for models whose base model does not give these hidden states: encoder-decoders.
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

    A forward pre-hook on the output embeddings selects them; the model's own code does the rest (biases, soft-caps, scales), so no
    architecture is a special case.

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
