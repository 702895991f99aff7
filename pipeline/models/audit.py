"""Check that every parameter of a loaded model comes from a file, by comparing their keys."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.errors import ModelError

logger = logging.getLogger(__name__)

#: Buffers that a module computes itself; files of older versions contain them.
_COMPUTED = re.compile(
    r"(^|\.)(inv_freq|position_ids|token_type_ids|masked_bias|cos_cached|sin_cached|k_scale|v_scale)$"
    r"|\.(attn|attention|crossattention)\.bias$"
)
#: Architectures whose head was trained for a task of its own.
_FINE_TUNED = re.compile(
    r"For(SequenceClassification|TokenClassification|ImageClassification|QuestionAnswering|MultipleChoice)$"
)
#: Prefix that a wrapper adds to every key -> the wrapper's name.
_WRAPPERS = {"module.": "DataParallel", "_orig_mod.": "torch.compile", "_fsdp_wrapped_module.": "FSDP"}


def missing_weights(model: Any, name: str, info: Mapping[str, Any], *, new_head: bool) -> tuple[str, ...]:
    """Return the parameters that are in no file of the checkpoint, sorted.

    The caller decides which of them may be missing.

    Args:
        info: the result of `from_pretrained(output_loading_info=True)`; transformers leaves out
            tied weights and buffers that the architecture computes itself.
        new_head: the head is to be trained; a head of the checkpoint with another number of classes
            is then replaced.

    Raises:
        ModelError: all keys carry a wrapper's prefix, a shape differs, or the checkpoint has
            weights that do not exist under the configuration.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    _refuse_prefix(name, missing, unexpected)
    other_shape = sorted(str(item[0]) for item in info["mismatched_keys"])
    head = [key for key in other_shape if new_head and not key.startswith(f"{model.base_model_prefix}.")]
    mismatched = [key for key in other_shape if key not in head]
    if mismatched:
        raise ModelError(
            f"{name}: {len(mismatched)} weights have another shape than config.json gives them ({_some(mismatched)}); "
            "use the config.json that the weights were saved with"
        )
    modules = {module for module, _ in model.named_modules()}
    homeless = [key for key in unexpected if _has_no_place(key, modules, model.base_model_prefix, new_head)]
    if homeless:
        raise ModelError(
            f"{name}: the checkpoint holds {len(homeless)} weights that {type(model).__name__} does not have under this configuration "
            f"({_some(homeless)}), so its logits would be another model's; use the config.json that the weights were saved with"
        )
    if head:
        logger.info(
            "%s: its head has another number of classes, and is replaced by a new one of %d",
            name,
            model.config.num_labels,
        )
    return tuple(sorted({*missing, *head}))


def refuse_more_blocks(name: str, tensors: Sequence[str], num_layers: int) -> None:
    """Refuse a GGUF file with more layers than its own configuration states.

    transformers drops such layers without a warning.

    Args:
        tensors: names of the tensors in the file. Blocks that predict more than one token ahead
            (`nextn`) are not layers.

    Raises:
        ModelError: names the first of them.
    """
    blocks: dict[int, list[str]] = {}
    for tensor in tensors:
        if found := re.match(r"blk\.(\d+)\.", tensor):
            blocks.setdefault(int(found[1]), []).append(tensor)
    more = [
        tensor
        for block, names in sorted(blocks.items())
        if block >= num_layers and not any(".nextn." in each for each in names)
        for tensor in names
    ]
    if more:
        raise ModelError(
            f"{name}: the file holds {len(more)} weights of layers that its block_count of {num_layers} has no place for ({_some(more)}), so its logits would be "
            "another model's; convert the model to GGUF again"
        )


def refuse_missing(model: Any, name: str, missing: Sequence[str], *, new_head: bool) -> None:
    """Refuse a model with parameters that come from no file.

    Args:
        new_head: parameters outside the base model, and its pooler, may be new.

    Raises:
        ModelError: names the parameters.
    """
    if new_head:
        missing = [key for key in missing if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key]
    if missing:
        is_language_model = any("CausalLM" in each for each in model.config.architectures or ())
        by_prompt = (
            ', or let the language model label by prompt with "softlabel cache-logits --prompt-template default"'
        )
        saved = next((each for each in model.config.architectures or () if _FINE_TUNED.search(each)), None)
        train = f'fine-tune it first with "softlabel train-teacher"{by_prompt if is_language_model else ""}'
        advice = train if saved is None else f"it is a {saved}: give the --task that this is for"
        raise ModelError(
            f"{name}: the checkpoint lacks {len(missing)} weights that {type(model).__name__} needs ({_some(missing)}), so its logits "
            f"would be noise; {advice}"
        )


def refuse_adapter(
    model: Any,
    name: str,
    file_keys: Collection[str],
    loaded: Any,
    missing: Sequence[str],
    *,
    base: str,
    adapter: str = "default",
) -> None:
    """Refuse an adapter that does not match its base model, or leaves the head without weights.

    Args:
        model: the PeftModel.
        file_keys: keys of the weights in the adapter's file.
        loaded: the missing and unexpected keys, as returned by `set_peft_model_state_dict`.
        missing: parameters of the base model that its own checkpoint lacks.

    Raises:
        ModelError: names the keys.
    """
    prompts = model.peft_config[adapter].is_prompt_learning  # PEFT loads `prompt_embeddings` itself
    biases = _biases(model, adapter)
    strangers = [
        key for key in loaded.unexpected_keys if key not in biases and not (prompts and key == "prompt_embeddings")
    ]
    if strangers:
        raise ModelError(
            f"{name}: {len(strangers)} weights of the adapter match no module of its base model {base} ({_some(strangers)}), "
            "so they would be left out; load it on the model class that it was trained on, or save it again from there"
        )
    of_adapter = re.compile(rf"\.{re.escape(adapter)}(\.|$)")
    lost = set(loaded.missing_keys)
    if not prompts:
        own = [key for key, _ in model.named_parameters() if of_adapter.search(key) and key in lost]
        own += sorted(key for key in biases - set(file_keys) if ".modules_to_save." not in key)  # a second copy
        if own:
            raise ModelError(
                f"{name}: the adapter's file lacks {len(own)} of the weights that adapter_config.json describes ({_some(own)}); save the adapter again"
            )
    given = {_base_name(key, adapter) for key in model.state_dict() if key not in lost}
    heads = [key for key in missing if key not in given]
    if heads:
        raise ModelError(
            f"{name}: {len(heads)} weights come from neither the adapter nor its base model {base} ({_some(heads)}), so its logits would be "
            "noise; save the adapter with the head in modules_to_save (PEFT: task_type SEQ_CLS), or name a base that has the head with --base-model"
        )


def _biases(model: Any, adapter: str) -> set[str]:
    """Return the keys of the base model's biases in an adapter's file, as PEFT writes them.

    They are there if `bias` of the adapter's configuration is not "none". PEFT writes some of them
    twice.
    """
    if getattr(model.peft_config[adapter], "bias", "none") == "none":
        return set()
    from peft.utils import get_peft_model_state_dict

    written = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {key for key in written if key.endswith(".bias")}


def _refuse_prefix(name: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    wanted = set(missing)
    for prefix, wrapper in _WRAPPERS.items():
        found = [key for key in unexpected if key.startswith(prefix) and key.removeprefix(prefix) in wanted]
        if found:
            raise ModelError(
                f"{name}: {len(found)} weights carry the prefix {prefix} of {wrapper} ({_some(found)}), under which no model expects them; "
                f"save the model inside the wrapper: model.{prefix}save_pretrained(...)"
            )


def _has_no_place(key: str, modules: Collection[str], base: str, new_head: bool) -> bool:
    """Return whether a key is a weight that is missing from a module that the model has.

    Keys of modules that the model does not have at all are heads of other tasks.
    """
    if _COMPUTED.search(key):
        return False
    for path in (key, f"{base}.{key}"):  # a checkpoint without a head has no prefix of the base model
        part = path.rpartition(".")[0]
        while part and part not in modules:
            part = part.rpartition(".")[0]
        if part and part != base:
            return part.startswith(f"{base}.") or not new_head
    return False


def _base_name(key: str, adapter: str) -> str:
    """Return the name in the base model of a weight of a PeftModel."""
    return (
        key.removeprefix("base_model.model.").replace(f".modules_to_save.{adapter}.", ".").replace(".base_layer.", ".")
    )


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
