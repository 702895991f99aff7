"""Log-probabilities of the labels' texts after prompts, by a local causal language model.

All labels of a batch share one pass over the prompts, which fills a cache of keys and values. The
labels are walked as a prefix tree: each of its inner nodes is one token more for every prompt of
the batch, and is taken out of the cache again. The tokens that all prompts begin with, instruction
and examples, are passed once.
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
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from pipeline.capture.forward import device_name
from pipeline.capture.teachers.judge.scorer import Labels
from pipeline.capture.teachers.local import Computed
from pipeline.errors import ModelError
from pipeline.models import LoadedModel, longest_input, model_info, pad_id
from pipeline.records import ModelInfo
from pipeline.tasks import embedding_rows

#: Layers of a cache that hold keys and values of tokens, or nothing. Subclasses hold more.
_OF_TOKENS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


@dataclass(slots=True)
class LocalScorer:
    """A causal language model in memory; the protocol of scorers says what each member is."""

    loaded: LoadedModel
    batch_tokens: int
    """Tokens of a forward pass, prefix and padding included."""
    _takes: frozenset[str] = field(default=frozenset(), init=False)
    """Arguments of the model's `forward`."""
    _is_recurrent: bool = field(default=False, init=False)
    """Whether every label is passed with its whole prompt: a recurrent layer has no keys and values
    to take tokens out of."""
    _kept: tuple[bytes, Any] | None = field(default=None, init=False)
    """A prefix, and its keys and values."""

    def __post_init__(self) -> None:
        model: Any = self.loaded.model
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        self._takes = frozenset(inspect.signature(inner.forward).parameters)
        self._is_recurrent = (
            bool(getattr(model, "_is_stateful", False))
            or "past_key_values" not in self._takes
            or any(type(layer) not in _OF_TOKENS for layer in DynamicCache(config=model.config).layers)
        )

    @property
    def name(self) -> str:
        """As messages name it."""
        return self.loaded.name

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return self.loaded.tokenizer

    @property
    def positions(self) -> int:
        """What the model has positions for."""
        return longest_input(self.loaded.model, self.loaded.tokenizer)

    @property
    def info(self) -> ModelInfo:
        """Name, weights and precision."""
        return model_info(self.loaded)

    @property
    def device(self) -> str:
        """The device model."""
        return device_name(self.loaded)

    @property
    def embedding_rows(self) -> int:
        """Of its input embedding."""
        return embedding_rows(self.loaded.model)

    @property
    def busy(self) -> bool:
        """Always, as a local model is."""
        return True

    def describe(self, info: ModelInfo) -> str:
        """Parameters, precision and device."""
        return f"{self.name}: {info.num_parameters:,} parameters, {info.dtype}, on {self.device}"

    def begin(self, prompts: Sequence[np.ndarray], labels: Labels, prefix: np.ndarray) -> Computed:
        """One pass over the prompts, in batches of similar length, and one for each inner node of the labels' tree."""
        if not self._allows_gaps:
            prefix = prefix[:0]
        out: Tensor | None = None
        with torch.inference_mode():
            for members, shared in self._batches(prompts, labels, prefix):
                batch = [prompts[i] for i in members]
                found = (
                    self.plain(batch, labels) if self._is_recurrent else self._of_tree(batch, labels, prefix[:shared])
                )
                out = found.new_zeros(len(prompts), found.shape[1]) if out is None else out
                out[torch.tensor(members, device=out.device)] = found
        assert out is not None
        return Computed(out)

    def compare(self, prompts: Sequence[np.ndarray], labels: Labels, prefix: np.ndarray) -> None:
        """Compare the scores with those of whole prompts, one prompt and one label at a time.

        Raises:
            ModelError: they differ by more than the precision explains.
        """
        found = self.begin(prompts, labels, prefix).result()
        plain = torch.cat([self.plain([prompt], labels) for prompt in prompts])
        tolerance = 1e-4 if self.loaded.model.dtype in (torch.float32, torch.float64) else 5e-2
        finite = plain.isfinite()  # those that are not are told row by row, later
        if not bool(finite.any()):
            return
        worst = float((plain - found)[finite].abs().max() / plain[finite].abs().max().clamp_min(1.0))
        if not worst <= tolerance:
            raise ModelError(
                f"{self.name}: log-probabilities of the labels after a shared prompt differ from those of one pass for each by {worst:.2g} (expected at most "
                f"{tolerance:g}); try --attn-implementation eager, and please report this architecture"
            )

    def close(self) -> None:
        """Nothing: the model goes with the last reference to it."""

    @property
    def _allows_gaps(self) -> bool:
        """Whether padding may stand between a prefix and a text.

        It shifts what is within a window or a chunk, and every position that a model counts by
        itself; Bloom counts those of the attention mask.
        """
        config: Any = self.loaded.model.config.get_text_config()
        windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        return ("position_ids" in self._takes or config.model_type == "bloom") and not any(windows)

    def plain(self, prompts: Sequence[np.ndarray], labels: Labels) -> Tensor:
        """(N, V): the scores by one pass for each label, over prompt and label; the reference."""
        found = []
        with torch.inference_mode():
            for label in labels:
                tail = np.asarray(label, dtype=np.int64)
                inputs = self._padded([np.concatenate([prompt, tail]) for prompt in prompts])
                logits = self._forward(inputs, keep=len(tail) + 1)[:, :-1]  # (N, tokens of the label, V of tokens)
                at = torch.from_numpy(tail).to(logits.device).expand(len(prompts), -1).unsqueeze(-1)
                found.append(_logprobs(logits).gather(-1, at).squeeze(-1).sum(-1))
        return torch.stack(found, dim=-1)

    def _batches(
        self, prompts: Sequence[np.ndarray], labels: Labels, prefix: np.ndarray
    ) -> Iterator[tuple[list[int], int]]:
        """Numbers of the prompts that are passed together, the longest first, and how many of their first tokens are the prefix."""
        longest_label = max(map(len, labels))
        size = len(prefix)
        begins = [
            size if not self._is_recurrent and len(ids) > size and np.array_equal(ids[:size], prefix) else 0
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

    def _of_tree(self, prompts: Sequence[np.ndarray], labels: Labels, prefix: np.ndarray) -> Tensor:
        """(N, V), of prompts that begin with the prefix, which may be empty."""
        shared = len(prefix)
        cache = self._prefix_of(prefix, len(prompts)) if shared else DynamicCache()
        inputs = self._padded([prompt[shared:] for prompt in prompts], before=shared)
        logits = self._forward(inputs, cache=cache)[:, -1]
        scores = _logprobs(logits[:, :1]).new_zeros(len(prompts), len(labels))
        self._walk(cache, inputs, logits, list(enumerate(labels)), scores)
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
            labels: class and remaining tokens, at least one, of the labels that begin with what was
                passed.
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

    def _prefix_of(self, prefix: np.ndarray, rows: int) -> Any:
        """Keys and values of a prefix, for so many rows."""
        key = prefix.tobytes()
        if self._kept is None or self._kept[0] != key:
            made = DynamicCache()
            self._forward(self._padded([prefix]), cache=made)
            self._kept = key, made
        cache = copy.deepcopy(self._kept[1])
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
