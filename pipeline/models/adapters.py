"""Read PEFT adapters: their configuration, base model and labels; load them onto the base model."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from pipeline.errors import MisuseError, ModelError
from pipeline.models.audit import refuse_adapter

UNLOADABLE = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError)

#: PEFT's file names.
CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
#: File next to a classifier's adapter with its label names, which the base model's config lacks.
LABELS = "labels.json"


#: A hub name: NAME or ORG/NAME.
_HUB_NAME = re.compile(r"[\w][\w.\-]*(/[\w][\w.\-]*)?")


def adapter_folder(name: str, revision: str | None = None) -> Path | None:
    """Return the directory with the files of a PEFT adapter, or None if the name is no adapter.

    It is the adapter's own directory, or a snapshot downloaded from the hub.

    Args:
        name: a name or path of any model or adapter.
        revision: revision on the hub.

    Raises:
        ModelError: it is an adapter, and its files cannot be downloaded.
    """
    local = Path(name).expanduser()
    if (local / CONFIG_NAME).is_file():
        return local
    if local.exists() or name.endswith(".gguf") or not _HUB_NAME.fullmatch(name):
        return None
    try:
        config = find_adapter_config_file(name, revision=revision)
    except UNLOADABLE:
        return None  # no such name or revision: loading it raises an error
    if config is None:
        return None
    folder = Path(config).parent  # its name is the commit
    try:
        for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, LABELS, "tokenizer_config.json"):
            if file != WEIGHTS_NAME or not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
                cached_file(name, file, revision=folder.name, _raise_exceptions_for_missing_entries=False)
    except UNLOADABLE as error:
        raise ModelError(f"{name}: the adapter's files cannot be fetched: {first_line(error)}; try again") from error
    return folder


def adapter_config(name: str, revision: str | None = None) -> Mapping[str, Any] | None:
    """Return the configuration of a PEFT adapter, or None if the name is no adapter.

    Raises:
        ModelError: the file cannot be read.
    """
    folder = adapter_folder(name, revision)
    if folder is None:
        return None
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({first_line(error)}); save the adapter again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(config).__name__}; save the adapter again")
    return config


def adapter_labels(name: str, revision: str | None = None) -> tuple[str, ...] | None:
    """Return the label names of a classifier's adapter, or None if it has no such file.

    Raises:
        ModelError: the file does not hold a list of names.
    """
    folder = adapter_folder(name, revision)
    if folder is None or not (folder / LABELS).is_file():
        return None
    path = folder / LABELS
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({first_line(error)}); write the list of label names again") from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ModelError(f"{path}: expected a JSON list of label names; write it again")
    return tuple(labels)


def base_name(name: str, adapter: Mapping[str, Any] | None, asked: str | None) -> str:
    """Return the name of the model to load first: an adapter's base model, or the model itself.

    Args:
        asked: `--base-model`, which replaces the base model that the adapter names.

    Raises:
        MisuseError: `--base-model` for a model that is no adapter.
        ModelError: the adapter names no base model, or its base model is an adapter.
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


def with_adapter(model: Any, name: str, folder: Path, missing: Sequence[str], *, base: str, trainable: bool) -> Any:
    """Return the model wrapped in an adapter, after checking that all weights come from a file.

    Args:
        folder: directory with the adapter's files.
        missing: parameters of the base model that its own checkpoint lacks; the adapter must
            contain them.
        base: name of the base model, which is also saved with the adapter.
        trainable: load the adapter for further training.

    Raises:
        ModelError: PEFT is not installed, or the adapter does not fit.
    """
    try:
        from peft import PeftModel
        from peft.utils import load_peft_weights, set_peft_model_state_dict
    except ImportError:
        raise ModelError(f"{name}: is a PEFT adapter; pip install 'soft-label-pipeline[lm]' to use it") from None
    path = str(folder)
    if not any((folder / file).is_file() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise ModelError(
            f"{name}: expected {SAFETENSORS_WEIGHTS_NAME} beside {CONFIG_NAME}, found no weights of the adapter, or they cannot be fetched; save it again"
        )
    try:
        weights = load_peft_weights(path, device="cpu")
        if not weights:
            raise ModelError(f"{name}: the adapter's file holds no weights; save the adapter again")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # raised below as an error
            adapted = PeftModel.from_pretrained(model, path, is_trainable=trainable)
        loaded = set_peft_model_state_dict(adapted, weights)  # again: from_pretrained does not report missing keys
    except KeyError as error:
        raise ModelError(
            f"{name}: the adapter's file lacks the weights {error} that adapter_config.json describes; save the adapter again"
        ) from error
    except UNLOADABLE as error:
        raise ModelError(f"{name}: the adapter does not fit its base model: {first_line(error)}") from error
    refuse_adapter(adapted, name, weights.keys(), loaded, missing, base=base)
    for settings in adapted.peft_config.values():
        settings.base_model_name_or_path = base  # saved with the adapter
    return adapted


def refuse_prompt_tokens(model: Any, name: str, *, marks_positions: bool) -> None:
    """Refuse an adapter whose virtual tokens shift the positions that logits are taken from.

    Encoders take the first position, whichever token is there.

    Raises:
        ModelError: prompt tuning of a language model, or of a classifier that takes the last
            position of a row.
    """
    settings = model.peft_config[model.active_adapter]
    kind = getattr(settings.peft_type, "value", str(settings.peft_type))
    if not settings.is_prompt_learning or kind == "PREFIX_TUNING":
        return
    if marks_positions or type(model.config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise ModelError(
            f"{name}: is an adapter of the kind {kind}, which puts {settings.num_virtual_tokens} tokens before each row and so moves its positions; "
            "expected one that does not, as LoRA, IA3 or prefix tuning"
        )


def first_line(error: Exception) -> str:
    """Return the first non-empty line of an error's message, or else its class name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
