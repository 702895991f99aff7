"""PEFT adapters: what a directory says of its base model, and the adapter around it."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.errors import MisuseError, ModelError
from pipeline.models.audit import refuse_adapter

UNLOADABLE = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError)

#: Beside a classifier's adapter: its label names, which the base model's config does not have.
LABELS = "labels.json"


def adapter_config(name: str) -> Mapping[str, Any] | None:
    """What a PEFT adapter directory says of itself; None where it is no such directory."""
    path = Path(name).expanduser() / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({first_line(error)}); save the adapter again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(config).__name__}; save the adapter again")
    return config


def adapter_labels(name: str) -> tuple[str, ...] | None:
    """The label names beside a classifier's adapter; None where there are none.

    Raises:
        ModelError: the file does not hold a list of names.
    """
    path = Path(name).expanduser() / LABELS
    if not path.is_file():
        return None
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({first_line(error)}); write the list of label names again") from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ModelError(f"{path}: expected a JSON list of label names; write it again")
    return tuple(labels)


def base_name(name: str, adapter: Mapping[str, Any] | None, asked: str | None) -> str:
    """The model to load first: an adapter's base, or the model itself.

    Args:
        asked: `--base-model`, which replaces what the adapter names.

    Raises:
        MisuseError: `--base-model` for a model that is no adapter.
        ModelError: the adapter names no base, or its base is an adapter.
    """
    if adapter is None:
        if asked is not None:
            raise MisuseError(f"--base-model {asked}: is for PEFT adapters, and {name} holds no adapter_config.json")
        return name
    base = asked or adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{name}: adapter_config.json names no base model (base_model_name_or_path is {json.dumps(base)}); name it with --base-model"
        )
    if adapter_config(base) is not None:
        raise ModelError(
            f"{name}: its base model {base} is an adapter itself; merge that one first (PEFT: merge_and_unload) and name the result with --base-model"
        )
    return base


def with_adapter(model: Any, name: str, missing: Sequence[str], *, base: str, trainable: bool) -> Any:
    """The model with the adapter of a directory around it, every weight of which comes from a file.

    Args:
        missing: parameters of the base that its own checkpoint lacks; the adapter has to bring them.

    Raises:
        ModelError: PEFT is not installed, or the adapter does not fit.
    """
    try:
        from peft import PeftModel
        from peft.utils import load_peft_weights, set_peft_model_state_dict
    except ImportError:
        raise ModelError(f"{name}: is a PEFT adapter; pip install 'soft-label-pipeline[lm]' to use it") from None
    path = str(Path(name).expanduser())
    try:
        weights = load_peft_weights(path, device="cpu")
        if not weights:
            raise ModelError(f"{name}: the adapter's file holds no weights; save the adapter again")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # said below, as an error
            adapted = PeftModel.from_pretrained(model, path, is_trainable=trainable)
        loaded = set_peft_model_state_dict(adapted, weights)  # once more: from_pretrained does not say what it left out
    except KeyError as error:
        raise ModelError(
            f"{name}: the adapter's file lacks the weights {error} that adapter_config.json describes; save the adapter again"
        ) from error
    except UNLOADABLE as error:
        raise ModelError(f"{name}: the adapter does not fit its base model: {first_line(error)}") from error
    refuse_adapter(adapted, name, loaded, missing, base=base)
    for settings in adapted.peft_config.values():
        settings.base_model_name_or_path = base  # what is saved again names the base that it was loaded on
    return adapted


def first_line(error: Exception) -> str:
    """The first line of an error that says anything."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
