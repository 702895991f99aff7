"""Greedy continuations of prompts, to inspect language models beyond their metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.cache import Cache
from pipeline.errors import MisuseError
from pipeline.models import load_model
from pipeline.models.predict import continue_text
from pipeline.records import Continuation
from pipeline.tasks import Task, get_task


def continue_prompts(
    cache: Cache,
    models: Mapping[str, str | Path],
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    base_models: Mapping[str, str] | None = None,
) -> tuple[Continuation, ...]:
    """Continue prompts greedily with each model, one model in memory at a time.

    Args:
        models: name -> directory or hub name.
        base_models: name -> base model of an adapter; overrides the one in its configuration.

    Raises:
        MisuseError: the task of the cache does not generate text.
        ModelError: a model cannot be loaded.
    """
    task = get_task(cache.manifest.contract.task)
    check_prompts(task)
    texts: list[dict[str, str]] = [{} for _ in prompts]
    for name, path in models.items():
        loaded = load_model(task, str(path), base_model=(base_models or {}).get(name))
        for prompt, found in zip(prompts, texts, strict=True):
            found[name] = continue_text(loaded, prompt, max_new_tokens)
    return tuple(Continuation(prompt, found) for prompt, found in zip(prompts, texts, strict=True))


def check_prompts(task: Task) -> None:
    """Check that the models of a task can continue prompts.

    Raises:
        MisuseError: the task does not generate text.
    """
    if not task.continues_prompts:
        raise MisuseError(f"--prompt is for language models; the cache is of the task {task.name}")
