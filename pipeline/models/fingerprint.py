"""Identify models and tokenizers by hashes of their content, not by paths."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ModelError
from pipeline.models.load import LoadedModel
from pipeline.models.processors import is_image_processor, processor_info
from pipeline.records import ModelInfo, TokenizerInfo


def model_info(loaded: LoadedModel) -> ModelInfo:
    """Return name, hash of the weights and precision of a loaded model.

    Raises:
        ModelError: some weights are offloaded, so that they cannot be hashed.
    """
    model: Any = loaded.model
    adapter = hasattr(model, "peft_config")
    base = model.get_base_model() if adapter else model
    tensors = model.state_dict()
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ModelError(
            f"{loaded.name}: does not fit on the devices (some weights are offloaded); use --quantization, --dtype bfloat16 or more memory"
        )
    added = {k: v for k, v in tensors.items() if adapter and ("lora_" in k or "modules_to_save" in k)}
    weights = {_plain_name(k): v for k, v in tensors.items() if k not in added}
    return ModelInfo(
        name=public_name(loaded.name),
        revision=loaded.revision,
        architecture=type(base).__name__,
        weights_sha256=_hash_tensors(weights),
        num_parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(base.dtype).removeprefix("torch."),
        attn_implementation=getattr(base.config, "_attn_implementation", None),
        quantization=loaded.quantization,
        adapter_sha256=_hash_tensors(added) if added else None,
        compiler=loaded.compiler,
        base_model=None if loaded.base_model is None else public_name(loaded.base_model),
    )


def tokenizer_info(tokenizer: PreTrainedTokenizerBase) -> TokenizerInfo:
    """Return the hash of everything that determines token ids, and that of the chat template.

    For an image processor, the hash is of everything that determines the pixel values.
    """
    if is_image_processor(tokenizer):
        return processor_info(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:  # set by each call, so not part of the tokenizer's identity
        rules.pop("truncation", None)
        rules.pop("padding", None)
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    content = json.dumps([rules, special], sort_keys=True)
    template = tokenizer.chat_template
    ids = {name.removesuffix("_token"): tokenizer.convert_tokens_to_ids(token) for name, token in special.items()}
    return TokenizerInfo(
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        chat_template_sha256=hashlib.sha256(str(template).encode()).hexdigest() if template else None,
        vocabulary_size=len(tokenizer),
        special_ids={name: i for name, i in ids.items() if isinstance(i, int)},
    )


def public_name(name: str) -> str:
    """Return a name that reveals no local path.

    Hub names and relative paths are unchanged. An absolute path becomes relative to the working
    directory, or else its last part.
    """
    path = Path(name)
    if not path.is_absolute() and ".." not in path.parts:
        return name
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return path.name


def _plain_name(name: str) -> str:
    """Return the name of a weight without PEFT's prefixes."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


def _hash_tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
