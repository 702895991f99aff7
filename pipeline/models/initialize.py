"""Make a student from its teacher: a smaller config with random weights, or copied layers."""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from pipeline.errors import MisuseError, ModelError
from pipeline.models.adapters import adapter_config
from pipeline.models.detect import detect_task
from pipeline.models.load import as_it_came, load_config, load_model, load_processor, load_tokenizer
from pipeline.models.start import write_start
from pipeline.models.vocabulary import (
    TOKENIZER_FILES,
    NewVocabulary,
    check_shapes,
    check_vocabulary,
    rows_of_vocabulary,
    with_vocabulary,
)

#: Part of the name of a weight that only the first layer of a list has.
_OF_FIRST_LAYER = "relative_attention_bias"


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a student with random weights; its other settings are scaled from the teacher."""

    num_layers: int
    hidden_size: int
    num_heads: int


@dataclass(frozen=True, slots=True)
class NewStudent:
    """An untrained student, compared with its teacher."""

    path: Path
    num_parameters: int
    teacher_parameters: int
    """0 if unknown."""
    layers: tuple[int, ...]
    """Numbers of the copied teacher layers, from 0; empty: all weights are random."""
    num_layers: int
    """Number of layers of the student."""
    teacher_layers: int
    vocabulary: NewVocabulary | None = None
    """The student's own vocabulary; None: the teacher's."""


def evenly_spaced(total: int) -> tuple[int, ...]:
    """Return a third of the layers, evenly spaced, with the first and the last.

    At least one layer is returned. The first layer reads the embeddings and the last writes the
    input of the head, so both are kept.
    """
    count = max(1, round(total / 3))
    return (0,) if count == 1 else tuple(round(i * (total - 1) / (count - 1)) for i in range(count))


def check_request(
    teacher: str | Path | PreTrainedModel,
    output: str | Path,
    *,
    layers: Sequence[int] | None = None,
    config: Shape | PreTrainedConfig | None = None,
) -> Any:
    """Check a student's settings before the teacher's weights are read or a tokenizer is trained.

    Returns:
        The teacher's configuration.

    Raises:
        MisuseError, ModelError: as in `make_student`.
    """
    if layers is not None and config is not None:
        raise MisuseError("init_student: give either layers=... or config=...")
    if isinstance(teacher, str | Path):
        if Path(output).resolve() == Path(teacher).resolve():
            raise MisuseError(f"--output {output}: is the teacher's own directory; use another")
        if adapter_config(str(teacher)) is not None:
            raise ModelError(
                f"{teacher}: is an adapter, which has no layers of its own; merge it into its base model first (PEFT: merge_and_unload)"
            )
    base: Any = teacher.config if isinstance(teacher, PreTrainedModel) else load_config(str(teacher))
    if not isinstance(config, PreTrainedConfig):
        _refuse_stages(base, str(teacher) if isinstance(teacher, str | Path) else type(teacher).__name__)
    total = _num_layers(base)
    for layer in layers or ():
        if not 0 <= layer < total:
            raise MisuseError(f"--layer {layer}: the teacher has layers 0 to {total - 1}")
    if isinstance(config, Shape):
        _scale(base, config)
    return base


def make_student(
    teacher: str | Path | PreTrainedModel,
    output: str | Path,
    *,
    layers: Sequence[int] | None = None,
    config: Shape | PreTrainedConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocabulary: NewVocabulary | None = None,
    seed: int = 0,
) -> NewStudent:
    """Write a student as a model directory.

    Args:
        teacher: a hub name, a path, or a model in memory (which needs `tokenizer`).
        layers: numbers of the teacher's layers to copy, from 0; embeddings and head are copied with
            them. Default without `config`: a third of the teacher's layers, evenly spaced.
        config: a shape, or a complete config (whose `architectures` names the class), for a student
            with random weights.
        tokenizer: the teacher's tokenizer, which is saved with the student. Default: loaded with
            the teacher.
        vocabulary: another tokenizer to save instead; embeddings and head get its size.

    Raises:
        MisuseError: both `layers` and `config`; a layer that the teacher does not have; a hidden
            size that is no multiple of the number of heads.
        ModelError: the teacher cannot be loaded, its layers cannot be found, or its weights cannot
            be converted to another vocabulary.
    """
    base = check_request(teacher, output, layers=layers, config=config)
    total = _num_layers(base)
    if isinstance(teacher, str | Path):
        reads = detect_task(str(teacher)).reads if tokenizer is None else "tokens"
        tokenizer = tokenizer or (load_tokenizer if reads != "images" else load_processor)(str(teacher))
    elif tokenizer is None:
        raise MisuseError("init_student: a live teacher needs its tokenizer=...")
    if config is None:
        layers = evenly_spaced(total) if layers is None else layers
        if isinstance(teacher, PreTrainedModel):
            student, teacher_parameters = _copy_layers(teacher, layers, vocabulary), teacher.num_parameters()
        else:
            loaded = load_model(detect_task(str(teacher)), str(teacher))
            with as_it_came(loaded):
                teacher_parameters = loaded.model.num_parameters()
                student = _copy_layers(loaded.model, layers, vocabulary)
    else:
        set_seed(seed)
        if isinstance(config, Shape):
            scaled = _scale(base, config)
            student = _class_of(base)(scaled if vocabulary is None else with_vocabulary(scaled, vocabulary))
        else:
            if hasattr(config.get_text_config(), "vocab_size"):
                check_vocabulary(config, vocabulary)
            student = _class_of(config)(config)
        teacher_parameters = teacher.num_parameters() if isinstance(teacher, PreTrainedModel) else _count(base)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as draft:
        student.save_pretrained(draft)
        (tokenizer if vocabulary is None else vocabulary.tokenizer).save_pretrained(draft)
        write_start(Path(draft), "random" if layers is None else "layers")
        path.mkdir(exist_ok=True)
        for name in TOKENIZER_FILES:  # left by an earlier student with another tokenizer
            if not Path(draft, name).exists():
                (path / name).unlink(missing_ok=True)
        for file in sorted(
            Path(draft).iterdir(), key=lambda f: f.name == "config.json"
        ):  # config.json last: it marks a complete model
            os.replace(file, path / file.name)
    return NewStudent(
        path,
        student.num_parameters(),
        teacher_parameters,
        tuple(layers or ()),
        _num_layers(student.config),
        total,
        vocabulary,
    )


def _num_layers(config: Any) -> int:
    """Return the number of layers of a model, over all stages if it has stages."""
    text = config.get_text_config()
    depths = getattr(text, "depths", None)
    return int(getattr(text, "num_hidden_layers", 0) if depths is None else sum(depths))


def _refuse_stages(config: Any, name: str) -> None:
    """Raise `ModelError` for a model that is not one list of layers of equal width."""
    text = config.get_text_config()
    if getattr(text, "depths", None) is not None or not hasattr(text, "num_hidden_layers"):
        raise ModelError(
            f"{name}: a {config.model_type} has stages of several widths, and no list of layers to choose from or to scale; "
            "name a smaller model of its family as the student, or give init_student(config=...) in Python"
        )


def _count(config: Any) -> int:
    """Return the number of parameters of a configuration, without weights.

    It is 0 if the class is not one of transformers.
    """
    if not hasattr(transformers, (config.architectures or [""])[0]):
        return 0
    with torch.device("meta"):
        return int(_class_of(config)(copy.deepcopy(config)).num_parameters())


def _copy_layers(teacher: PreTrainedModel, layers: Sequence[int], vocabulary: NewVocabulary | None) -> PreTrainedModel:
    """Return a model of the same class with fewer layers and copied weights.

    With another vocabulary, embeddings and head are computed from the teacher's.

    Raises:
        ModelError: a layer is of another kind than the student's layer in its place.
    """
    total = teacher.config.get_text_config().num_hidden_layers
    config = _resized(teacher.config, list(layers))
    prefixes = _layer_lists(teacher, total)
    pattern = re.compile(f"({'|'.join(map(re.escape, prefixes))})" + r"\.(\d+)\.(.*)")
    weights = teacher.state_dict()
    if vocabulary is not None:
        config = with_vocabulary(config, vocabulary)
        weights |= rows_of_vocabulary(teacher, vocabulary, config)
    chosen = {}
    for name, tensor in weights.items():
        match = pattern.fullmatch(name)
        if match is None:
            chosen[name] = tensor
            continue
        for new, old in enumerate(layers):
            if old == int(match[2]):
                chosen[f"{match[1]}.{new}.{match[3]}"] = tensor
    student: Any = type(teacher)(config)
    if teacher.config.is_encoder_decoder:  # T5: only the first layer has relative position biases
        for name in weights.keys() & student.state_dict().keys():
            if _OF_FIRST_LAYER in name:
                chosen.setdefault(name, weights[name])
        chosen = {name: t for name, t in chosen.items() if _OF_FIRST_LAYER not in name or name in student.state_dict()}
    if vocabulary is not None:
        check_shapes(student, chosen)
    missing, unexpected = student.to(teacher.dtype).load_state_dict(chosen, strict=False)
    if missing or unexpected:
        raise ModelError(
            f"{type(teacher).__name__}: layers {', '.join(map(str, layers))} do not fit in their new places, where layers are of another kind (mixtures of experts "
            f"behind a dense layer, say): {len(missing)} weights would be missing, such as {min(missing, default='none')}; choose others, or use --num-layers, --hidden-size, --num-heads"
        )
    result: PreTrainedModel = student
    return result


def _layer_lists(model: PreTrainedModel, total: int) -> list[str]:
    """Return the names of the module lists with the layers: one, or two of an encoder-decoder.

    Raises:
        ModelError: no list has this number of layers, or encoder and decoder have other numbers.
    """
    if not model.config.is_encoder_decoder:
        return [_layer_list(model, total)]
    found = {
        f"{name}.{child}": len(layers)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("encoder", "decoder")
        for child, layers in module.named_children()
        if isinstance(layers, nn.ModuleList)
    }
    if list(found.values()) != [total, total]:
        lists = ", ".join(f"{name} of {count}" for name, count in found.items()) or "none"
        raise ModelError(
            f"{type(model).__name__}: expected an encoder and a decoder of {total} layers each to choose from, found lists: {lists}; use --num-layers, --hidden-size, --num-heads"
        )
    return list(found)


def _layer_list(model: nn.Module, total: int) -> str:
    """Return the name of the module list with the layers.

    Raises:
        ModelError: no list has this number of layers.
    """
    found: list[str] = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if not found:
        raise ModelError(
            f"{type(model).__name__}: found no list of {total} layers to choose from; use --num-layers, --hidden-size, --num-heads"
        )
    return min(found, key=lambda name: name.count("."))


def _resized(config: Any, layers: list[int]) -> PreTrainedConfig:
    """Return the config for the chosen layers, with the settings that are given per layer."""
    smaller: Any = copy.deepcopy(config)
    text = smaller.get_text_config()
    total = text.num_hidden_layers
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        values = getattr(text, name, None)
        if isinstance(values, list) and len(values) == total:
            setattr(text, name, [values[i] for i in layers])
    for name in ("encoder_layers", "decoder_layers", "num_decoder_layers"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, len(layers))
    text.num_hidden_layers = len(layers)
    result: PreTrainedConfig = smaller
    return result


def _scale(config: Any, shape: Shape) -> PreTrainedConfig:
    """Return the teacher's config in another size; feed-forward width and KV heads are scaled.

    Raises:
        MisuseError: a number below 1, or a hidden size that is no multiple of the number of heads.
    """
    if min(shape.num_layers, shape.hidden_size, shape.num_heads) < 1:
        raise MisuseError(f"--num-layers, --hidden-size, --num-heads: expected at least 1 each, found {shape}")
    if shape.hidden_size % shape.num_heads:
        raise MisuseError(f"--hidden-size {shape.hidden_size}: expected a multiple of --num-heads {shape.num_heads}")
    text = config.get_text_config()
    width, heads, total = text.hidden_size, text.num_attention_heads, text.num_hidden_layers
    smaller: Any = _resized(config, [i % total for i in range(shape.num_layers)])
    new = smaller.get_text_config()
    for name in (
        "intermediate_size",
        "d_ff",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "ffn_dim",
        "hidden_dim",
        "n_inner",
        "word_embed_proj_dim",
        "embedding_size",
        "pooler_hidden_size",
        "pooler_output_size",
    ):
        value = getattr(text, name, None)
        if isinstance(value, int):
            setattr(new, name, max(1, value * shape.hidden_size // width))
    if isinstance(getattr(text, "num_key_value_heads", None), int):
        kv = max(1, shape.num_heads * text.num_key_value_heads // heads)
        new.num_key_value_heads = next(n for n in range(kv, 0, -1) if shape.num_heads % n == 0)
    if isinstance(getattr(text, "head_dim", None), int):
        new.head_dim = shape.hidden_size // shape.num_heads
    if isinstance(getattr(text, "query_pre_attn_scalar", None), int | float):
        new.query_pre_attn_scalar = shape.hidden_size // shape.num_heads
    new.hidden_size = shape.hidden_size
    new.num_attention_heads = shape.num_heads
    for name in ("encoder_attention_heads", "decoder_attention_heads"):
        if isinstance(getattr(text, name, None), int):
            setattr(new, name, shape.num_heads)
    result: PreTrainedConfig = smaller
    return result


def _class_of(config: Any) -> Any:
    name = (config.architectures or [""])[0]
    found = getattr(transformers, name, None)
    if found is None:
        raise ModelError(
            f"the teacher's config names no architecture of transformers (found {name!r}), so its kind of head is unknown"
        )
    return found
