"""How language models go on from a prompt: what figures do not show."""

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
    """Greedy continuations, one model in memory at a time.

    Args:
        models: name -> directory or hub name.
        base_models: name -> base model of an adapter, in place of the one that it names.

    Raises:
        MisuseError: the cache is of a task that generates nothing.
        ModelError: a model that cannot be loaded.
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
    """Refuse prompts for what generates nothing.

    Raises:
        MisuseError: the task is another.
    """
    if not task.continues_prompts:
        raise MisuseError(f"--prompt is for language models; the cache is of the task {task.name}")
