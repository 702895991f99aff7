"""Detect the task of a saved model from its configuration."""

from __future__ import annotations

from typing import Any

from pipeline.errors import ModelError
from pipeline.models.adapters import adapter_config, base_name
from pipeline.models.load import load_config
from pipeline.tasks import TASKS, Task


def detect_task(name: str, *, trust_remote_code: bool = False, base_model: str | None = None) -> Task:
    """Return the task that a model's head is for.

    It is found by the architecture; for an adapter by the adapter's task type, or else by its base
    model.

    Args:
        base_model: base model of an adapter, instead of the one that the adapter names.

    Raises:
        ModelError: the model cannot be loaded, or its head is for no known task.
    """
    adapter = adapter_config(name)
    kind = None if adapter is None else adapter.get("task_type")
    if kind is not None:
        found = next((task for task in TASKS.values() if task.peft_type == kind), None)
        what = f"an adapter of the type {kind!r}"
    else:
        base = base_name(name, adapter, base_model)
        config = load_config(base, trust_remote_code=trust_remote_code)
        architecture = (config.architectures or [""])[0]
        tasks = [task for task in TASKS.values() if architecture in _class_names(task.auto_class)]
        if config.is_encoder_decoder:  # BART is registered as a masked language model too
            tasks.sort(key=lambda task: task.label_source != "target")
        stated = [task for task in tasks if task.problem_type == config.problem_type]
        found = next(iter([*stated, *tasks]), None)
        what = f"the architecture {architecture!r}"
    if found is None:
        raise ModelError(f"{name}: expected a model of the task {' or '.join(TASKS)}, found {what}")
    return found


def _class_names(auto_class: Any) -> set[str]:
    """Return class names; resolving the classes would import every architecture of transformers."""
    mapping = auto_class._model_mapping
    named = [entry if isinstance(entry, tuple) else (entry,) for entry in mapping._model_mapping.values()]
    registered = [entry if isinstance(entry, tuple) else (entry,) for entry in mapping._extra_content.values()]
    return {name for names in named for name in names} | {cls.__name__ for found in registered for cls in found}
