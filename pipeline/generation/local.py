"""Generation by a local model: `generate` of transformers on padded batches, with seeded draws."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pipeline.capture.forward import device_name
from pipeline.capture.plan import plan_batches
from pipeline.errors import ModelError
from pipeline.generation.draws import SeededDraws, stream_key
from pipeline.generation.records import Asked, Completion, FinishReason, Prompt, Sampling
from pipeline.generation.writer import completion_text, end_ids
from pipeline.models import LoadedModel, longest_input, model_info, pad_id
from pipeline.records import BadRow, ModelInfo
from pipeline.tasks import Task, embedding_rows

#: Maximum prompt tokens and number of padding tokens in the check of left padding.
_CHECKED_TOKENS, _PADDING = 64, 3


@dataclass(frozen=True, slots=True)
class LocalWriter:
    """A writer with a model in memory; see `Writer` for the members."""

    task: Task
    loaded: LoadedModel
    stops: tuple[str, ...] = ()
    """The texts of `--stop`; special tokens among them are end tokens."""

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.loaded.name

    @property
    def device(self) -> str:
        """Name of the device."""
        return device_name(self.loaded)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """EOS of the tokenizer, and end tokens of the model's generation config and of `--stop`.

        Chat models often end a turn with another token than EOS.
        """
        config: Any = getattr(self.loaded.model, "generation_config", None)
        return end_ids(getattr(config, "eos_token_id", None), self.loaded.tokenizer, self.stops)

    @property
    def longest(self) -> int:
        """The largest number of tokens that the model has positions for."""
        return longest_input(self.loaded.model, self.loaded.tokenizer)

    @property
    def num_ids(self) -> int:
        """Number of rows of the input embedding."""
        return embedding_rows(self.loaded.model)

    def info(self) -> ModelInfo:
        """Return the name, weights and precision of the model."""
        return model_info(self.loaded)

    def batches(self, lengths: Sequence[int], batch_tokens: int) -> list[tuple[list[int], int]]:
        """Group completions of similar lengths, the longest first."""
        return plan_batches(lengths, batch_tokens)

    def write(self, asked: Sequence[Asked], sampling: Sampling) -> list[Completion | BadRow]:
        """Generate the completions of a batch in one call of `generate`."""
        model: Any = self.loaded.model
        prompts = [each.prompt.input_ids for each in asked]
        keys = [stream_key(sampling.seed, each.split, each.prompt.source_row, each.sample) for each in asked]
        draws = SeededDraws(sampling, torch.tensor(keys, dtype=torch.int64, device=model.device), self._num_classes())
        width = max(map(len, prompts))
        stops = _StopTexts(self.loaded.tokenizer, sampling.stop, width, len(prompts))
        drawn = self._generate(prompts, sampling.max_new_tokens, draws, stops)[:, width:].cpu().numpy()
        logprobs = torch.stack(draws.logprobs, 1).cpu().numpy()
        return [self._completion(each, drawn[i], logprobs[i], stops.ends[i], sampling) for i, each in enumerate(asked)]

    def check(self, prompts: Sequence[Prompt], *, batch_tokens: int) -> None:
        """Check that left padding does not change the logits after the beginning of a prompt.

        Raises:
            ModelError: the logits differ by more than the precision explains.
        """
        short = min(prompts, key=lambda prompt: len(prompt.input_ids), default=None)
        if short is None or batch_tokens == 1:
            return
        ids = short.input_ids[: max(1, min(_CHECKED_TOKENS, self.longest - _PADDING - 1))]
        longer = np.concatenate([ids, np.resize(ids, _PADDING)])
        alone, padded = _Recorder(), _Recorder()
        self._generate([ids], 1, alone)
        self._generate([ids, longer], 1, padded)
        plain, found = alone.scores[0].float(), padded.scores[0].float()
        finite = plain.isfinite() & found.isfinite()
        if not bool(finite.any()):
            return
        worst = float((plain - found)[finite].abs().max() / plain[finite].abs().max().clamp_min(1.0))
        tolerance = 1e-3 if self.loaded.model.dtype == torch.float32 else 5e-2
        if not worst <= tolerance:
            raise ModelError(
                f"{self.name}: the logits of a prompt differ by {worst:.2g} with padding on the left (expected at most "
                f"{tolerance:g}), so that completions would depend on their batch; --batch-tokens 1 writes one at a time"
            )

    def close(self) -> None:
        """Do nothing; there are no connections."""

    def _num_classes(self) -> int:
        return self.task.num_classes(self.loaded.model, self.loaded.tokenizer)

    def _generate(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        processor: LogitsProcessor,
        stops: StoppingCriteria | None = None,
    ) -> Tensor:
        """Return (B, W + T'): the prompts, padded on the left to W, and the generated tokens.

        Raises:
            ModelError: out of memory.
        """
        model: Any = self.loaded.model
        width, pad = max(map(len, prompts)), pad_id(self.loaded.tokenizer, model)
        ids = np.full((len(prompts), width), pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = prompt, 1
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self.end_ids) or None,
            pad_token_id=pad,
            use_cache=True,
        )
        try:
            with torch.inference_mode(), _own_settings(model, settings):
                found: Tensor = model.generate(
                    input_ids=torch.from_numpy(ids).to(model.device),
                    attention_mask=torch.from_numpy(mask).to(model.device),
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([processor]),
                    stopping_criteria=StoppingCriteriaList([] if stops is None else [stops]),
                )
        except torch.OutOfMemoryError:
            raise ModelError(
                f"out of memory in a batch of {len(prompts)} rows of {width} tokens and {max_new_tokens} new ones; the batches "
                "are part of what makes the bytes the same, so start again with a smaller --batch-tokens and --overwrite"
            ) from None
        return found

    def _completion(
        self, asked: Asked, drawn: np.ndarray, logprobs: np.ndarray, stopped: int | None, sampling: Sampling
    ) -> Completion | BadRow:
        """Build a completion from the tokens up to its first end token or stop text."""
        ends = np.flatnonzero(np.isin(drawn, self.end_ids))
        end = int(ends[0]) + 1 if len(ends) else None
        length = min(x for x in (end, stopped, len(drawn)) if x is not None)
        ids = drawn[:length].astype(np.int32)
        logprob = float(logprobs[:length].sum())
        if not np.isfinite(logprob):
            return BadRow(asked.split, asked.prompt.source_row, "the model's logits are not finite")
        text, found = completion_text(self.loaded.tokenizer, asked.prompt.input_ids, ids, sampling.stop)
        reason: FinishReason = "stop" if found else "eos" if end == length else "length"
        return Completion(text, ids, reason, logprob)


class _StopTexts(StoppingCriteria):
    """Ends a row when its completion contains a stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], width: int, rows: int) -> None:
        self.ends: list[int | None] = [None] * rows
        """Number of tokens of each completion that a stop text ends, else None."""
        self._tokenizer, self._stops, self._width = tokenizer, stops, width
        # A token has at least one byte. Special tokens and tokens of partial characters have none,
        # hence the extra 8.
        self._window = max((len(stop.encode()) for stop in stops), default=0) + 8

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return (B,) bool: whether each row has ended."""
        drawn = input_ids[:, self._width :]
        if self._stops:
            for i, row in enumerate(drawn[:, -self._window :].tolist()):
                if self.ends[i] is None:
                    text = self._tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                    if any(stop in text for stop in self._stops):
                        self.ends[i] = drawn.shape[1]
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)


class _Recorder(LogitsProcessor):
    """Records the logits of the first row."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores[0].clone())
        return scores


@contextlib.contextmanager
def _own_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Replace the model's generation config during generation.

    Its own config may contain other settings, such as a repetition penalty.
    """
    models = [model, *([model.get_base_model()] if hasattr(model, "peft_config") else [])]
    before = [each.generation_config for each in models]
    model.generation_config = settings
    try:
        yield
    finally:
        for each, its in zip(models, before, strict=True):
            each.generation_config = its
