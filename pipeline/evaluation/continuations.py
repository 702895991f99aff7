"""How language models go on from a prompt: what figures do not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.cache import Cache
from pipeline.errors import MisuseError
from pipeline.models import load_model, pad_id
from pipeline.records import Continuation
from pipeline.tasks import get_task


def continue_prompts(
    cache: Cache, models: Mapping[str, str | Path], prompts: Sequence[str], *, max_new_tokens: int = 32
) -> tuple[Continuation, ...]:
    """Greedy continuations, one model in memory at a time.

    Args:
        models: name -> directory or hub name.

    Raises:
        MisuseError: the cache is of a task that generates nothing.
        ModelError: a model that cannot be loaded.
    """
    task = get_task(cache.manifest.contract.task)
    if not task.classes_are_tokens:
        raise MisuseError(f"--prompt is for language models; the cache is of the task {task.name}")
    texts: list[dict[str, str]] = [{} for _ in prompts]
    for name, path in models.items():
        loaded = load_model(task, str(path))
        model: Any = loaded.model
        for prompt, found in zip(prompts, texts, strict=True):
            inputs = loaded.tokenizer(prompt, return_tensors="pt").to(model.device)
            inputs.pop("token_type_ids", None)
            with torch.inference_mode():
                ids = model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=pad_id(loaded.tokenizer),
                )
            after = ids[0, inputs["input_ids"].shape[1] :]
            found[name] = str(loaded.tokenizer.decode(after, skip_special_tokens=True))
    return tuple(Continuation(prompt, found) for prompt, found in zip(prompts, texts, strict=True))
