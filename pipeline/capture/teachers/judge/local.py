"""Log-probabilities of label texts after prompts, from a local causal language model.

All labels of a batch share one pass over the prompts, which fills a key-value cache. The labels are
traversed as a prefix tree: each inner node is one more token for every prompt of the batch, which
is removed from the cache afterwards. The tokens that all prompts begin with (instruction and
examples) are processed once.
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

#: Cache layers that hold keys and values of tokens, or nothing. Subclasses hold more.
_OF_TOKENS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


@dataclass(slots=True)
class LocalScorer:
    """A scorer with a causal language model in memory; see `Scorer` for the members."""

    loaded: LoadedModel
    batch_tokens: int
    """Tokens of a forward pass, including prefix and padding."""
    _takes: frozenset[str] = field(default=frozenset(), init=False)
    """Argument names of the model's `forward`."""
    _is_recurrent: bool = field(default=False, init=False)
    """Whether every label is processed together with its whole prompt: the state of a recurrent
    layer cannot be rolled back by a token."""
    _kept: tuple[bytes, Any] | None = field(default=None, init=False)
    """A prefix as bytes, and its key-value cache."""

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
        """Name for messages."""
        return self.loaded.name

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.loaded.tokenizer

    @property
    def positions(self) -> int:
        """The largest number of tokens that the model has positions for."""
        return longest_input(self.loaded.model, self.loaded.tokenizer)

    @property
    def info(self) -> ModelInfo:
        """Name, weights and precision of the model."""
        return model_info(self.loaded)

    @property
    def device(self) -> str:
        """Name of the device."""
        return device_name(self.loaded)

    @property
    def embedding_rows(self) -> int:
        """Number of rows of the input embedding."""
        return embedding_rows(self.loaded.model)

    @property
    def busy(self) -> bool:
        """Always true; see `LocalTeacher.busy`."""
        return True

    def describe(self, info: ModelInfo) -> str:
        """Return the number of parameters, the precision and the device."""
        return f"{self.name}: {info.num_parameters:,} parameters, {info.dtype}, on {self.device}"

    def begin(self, prompts: Sequence[np.ndarray], labels: Labels, prefix: np.ndarray) -> Computed:
        """Score the labels: one pass over the prompts, and one per inner node of the label tree.

        Prompts of similar length share a batch.
        """
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
        """Compare the scores with those of single passes over each whole prompt with each label.

        Raises:
            ModelError: the scores differ by more than the precision explains.
        """
        found = self.begin(prompts, labels, prefix).result()
        plain = torch.cat([self.plain([prompt], labels) for prompt in prompts])
        tolerance = 1e-4 if self.loaded.model.dtype in (torch.float32, torch.float64) else 5e-2
        finite = plain.isfinite()  # non-finite scores are reported row by row
        if not bool(finite.any()):
            return
        worst = float((plain - found)[finite].abs().max() / plain[finite].abs().max().clamp_min(1.0))
        if not worst <= tolerance:
            raise ModelError(
                f"{self.name}: log-probabilities of the labels after a shared prompt differ from those of one pass for each by {worst:.2g} (expected at most "
                f"{tolerance:g}); try --attn-implementation eager, and please report this architecture"
            )

    def close(self) -> None:
        """Do nothing; the model is freed with its last reference."""

    @property
    def _allows_gaps(self) -> bool:
        """Whether padding between a prefix and a text leaves the results unchanged.

        Padding shifts the limits of windows and chunks, and all positions if the model counts them
        itself. Bloom counts positions in the attention mask, which excludes padding.
        """
        config: Any = self.loaded.model.config.get_text_config()
        windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        return ("position_ids" in self._takes or config.model_type == "bloom") and not any(windows)

    def plain(self, prompts: Sequence[np.ndarray], labels: Labels) -> Tensor:
        """Return the (N, V) reference scores: one pass per label over prompt and label."""
        found = []
        with torch.inference_mode():
            for label in labels:
                tail = np.asarray(label, dtype=np.int64)
                inputs = self._padded([np.concatenate([prompt, tail]) for prompt in prompts])
                logits = self._forward(inputs, keep=len(tail) + 1)[:, :-1]  # (N, label tokens, V of tokens)
                at = torch.from_numpy(tail).to(logits.device).expand(len(prompts), -1).unsqueeze(-1)
                found.append(_logprobs(logits).gather(-1, at).squeeze(-1).sum(-1))
        return torch.stack(found, dim=-1)

    def _batches(
        self, prompts: Sequence[np.ndarray], labels: Labels, prefix: np.ndarray
    ) -> Iterator[tuple[list[int], int]]:
        """Yield the indices of the prompts of each pass, and the size of their prefix."""
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
        """Return the (N, V) scores of prompts that begin with the prefix, which may be empty."""
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
            inputs: inputs of the last pass.
            logits: (N, V of tokens), at the last token of that pass.
            labels: (class, remaining tokens), at least one token each, of the labels that begin
                with the tokens processed so far.
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
        """Return the key-value cache of a prefix, repeated for `rows` rows."""
        key = prefix.tobytes()
        if self._kept is None or self._kept[0] != key:
            made = DynamicCache()
            self._forward(self._padded([prefix]), cache=made)
            self._kept = key, made
        cache = copy.deepcopy(self._kept[1])
        cache.batch_repeat_interleave(rows)
        return cache

    def _padded(self, rows: Sequence[np.ndarray], before: int = 0) -> dict[str, Tensor]:
        """Pad rows on the left, so that all rows end at the same column.

        Args:
            before: number of tokens per row in the key-value cache.
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
        """Return (N, keep, V of tokens): the logits of the last tokens."""
        arguments: dict[str, Any] = {name: value for name, value in inputs.items() if name in self._takes}
        if "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = keep
        if cache is not None:
            arguments |= {"past_key_values": cache, "use_cache": True}
        logits: Tensor = self.loaded.model(**arguments).logits
        return logits[:, -keep:]


def _logprobs(logits: Tensor) -> Tensor:
    """Return log-probabilities in float32 or float64."""
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
