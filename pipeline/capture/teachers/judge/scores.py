"""Log-probabilities of the labels' texts after prompts, by a local causal language model.

All labels of a batch share one pass over the prompts, which fills a cache of keys and values. The labels are walked as a
prefix tree: each of its inner nodes is one token more for every prompt of the batch, and is taken out of the cache again.
The tokens that all prompts begin with, instruction and examples, are passed once.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.models import LoadedModel, pad_id

Labels = Sequence[tuple[int, ...]]


@dataclass(slots=True)
class LabelScores:
    """Scores prompts; keeps the keys and values of the prompts' common prefix."""

    loaded: LoadedModel
    label_ids: tuple[tuple[int, ...], ...]
    prefix: np.ndarray
    """(P,) int64."""
    batch_tokens: int
    """Tokens of a forward pass, prefix and padding included."""
    _kept: Any = field(default=None, init=False)
    _takes: frozenset[str] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        model: Any = self.loaded.model
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        self._takes = frozenset(inspect.signature(inner.forward).parameters)
        config = inner.config.get_text_config()
        if getattr(config, "sliding_window", None):
            # Padding between prefix and text would shift what is within the window.
            self.prefix = self.prefix[:0]

    @property
    def is_plain(self) -> bool:
        """Whether every label is passed with its whole prompt: a recurrent model has no keys and values to take tokens out of."""
        return bool(getattr(self.loaded.model, "_is_stateful", False)) or "past_key_values" not in self._takes

    def __call__(self, prompts: Sequence[np.ndarray]) -> Tensor:
        """(N, V): sum of the log-probabilities of each label's tokens, nats, after each prompt."""
        out: Tensor | None = None
        with torch.inference_mode():
            for members, shared in self._batches(prompts):
                batch = [prompts[i] for i in members]
                found = self.plain(batch) if self.is_plain else self._of_tree(batch, shared)
                out = found.new_zeros(len(prompts), found.shape[1]) if out is None else out
                out[torch.tensor(members, device=out.device)] = found
        assert out is not None
        return out

    def plain(self, prompts: Sequence[np.ndarray]) -> Tensor:
        """(N, V): the same by one pass for each label, over prompt and label; the reference."""
        found = []
        with torch.inference_mode():
            for label in self.label_ids:
                tail = np.asarray(label, dtype=np.int64)
                inputs = self._padded([np.concatenate([prompt, tail]) for prompt in prompts])
                logits = self._forward(inputs, keep=len(tail) + 1)[:, :-1]  # (N, tokens of the label, V of tokens)
                at = torch.from_numpy(tail).to(logits.device).expand(len(prompts), -1).unsqueeze(-1)
                found.append(_logprobs(logits).gather(-1, at).squeeze(-1).sum(-1))
        return torch.stack(found, dim=-1)

    def _batches(self, prompts: Sequence[np.ndarray]) -> Iterator[tuple[list[int], int]]:
        """Numbers of the prompts that are passed together, the longest first, and how many of their first tokens are the prefix."""
        longest_label = max(map(len, self.label_ids))
        size = len(self.prefix)
        begins = [
            size if not self.is_plain and len(ids) > size and np.array_equal(ids[:size], self.prefix) else 0
            for ids in prompts
        ]
        batch: list[int] = []
        width = 0
        for i in sorted(range(len(prompts)), key=lambda i: (begins[i], -len(prompts[i]), i)):
            ends = batch and (begins[batch[0]] != begins[i] or (len(batch) + 1) * width > self.batch_tokens)
            if ends:
                yield batch, begins[batch[0]]
            if ends or not batch:
                batch, width = [], len(prompts[i]) + longest_label
            batch.append(i)
        yield batch, begins[batch[0]]

    def _of_tree(self, prompts: Sequence[np.ndarray], shared: int) -> Tensor:
        cache = self._prefix_of(len(prompts)) if shared else DynamicCache()
        inputs = self._padded([prompt[shared:] for prompt in prompts], before=shared)
        logits = self._forward(inputs, cache=cache)
        scores = torch.zeros(len(prompts), len(self.label_ids), dtype=_logprobs(logits[:1, :, :1]).dtype)
        scores = scores.to(logits.device)
        self._walk(cache, inputs, logits[:, -1], list(enumerate(self.label_ids)), scores)
        return scores

    def _walk(
        self,
        cache: Any,
        inputs: Mapping[str, Tensor],
        logits: Tensor,
        labels: Sequence[tuple[int, tuple[int, ...]]],
        scores: Tensor,
    ) -> None:
        """Add the log-probabilities of the labels' remaining tokens to the scores.

        Args:
            inputs: of the pass that came last.
            logits: (N, V of tokens) at its last token.
            labels: class and remaining tokens, at least one, of the labels that begin with what was passed.
        """
        logprobs = _logprobs(logits)
        branches: dict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
        for label, (token, *rest) in labels:
            scores[:, label] += logprobs[:, token]
            if rest:
                branches[token].append((label, tuple(rest)))
        for token, below in branches.items():
            mask, last = inputs["attention_mask"], inputs["position_ids"][:, -1:]
            step = {
                "input_ids": torch.full_like(last, token),
                "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1),
                "position_ids": last + 1,
            }
            self._walk(cache, step, self._forward(step, cache=cache)[:, -1], below, scores)
            cache.crop(-1)

    def _prefix_of(self, rows: int) -> Any:
        """Keys and values of the prefix, for so many rows."""
        if self._kept is None:
            self._kept = DynamicCache()
            self._forward(self._padded([self.prefix]), cache=self._kept)
        cache = copy.deepcopy(self._kept)
        cache.batch_repeat_interleave(rows)
        return cache

    def _padded(self, rows: Sequence[np.ndarray], before: int = 0) -> dict[str, Tensor]:
        """Padded on the left, so that all rows end together.

        Args:
            before: tokens that the cache of keys and values holds of each row.
        """
        model: Any = self.loaded.model
        width = max(map(len, rows))
        ids = np.full((len(rows), width), pad_id(self.loaded.tokenizer, model), dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = row
            mask[i, width - len(row) :] = 1
        positions = before + (mask.cumsum(-1) - 1).clip(0)
        mask = np.concatenate([np.ones((len(rows), before), dtype=np.int64), mask], axis=1)
        made = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return {name: torch.from_numpy(value).to(model.device) for name, value in made.items()}

    def _forward(self, inputs: Mapping[str, Tensor], *, cache: Any = None, keep: int = 1) -> Tensor:
        """(N, keep, V of tokens): logits of the last tokens."""
        arguments: dict[str, Any] = {name: value for name, value in inputs.items() if name in self._takes}
        if "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = keep
        if cache is not None:
            arguments |= {"past_key_values": cache, "use_cache": True}
        logits: Tensor = self.loaded.model(**arguments).logits
        return logits[:, -keep:]


def _logprobs(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
