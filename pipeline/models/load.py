"""Load a model and its tokenizer from a hub name, a directory, a PEFT adapter or a GGUF file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.utils.hub import cached_file

from pipeline.errors import MisuseError, ModelError
from pipeline.models.adapters import (
    UNLOADABLE,
    adapter_config,
    adapter_folder,
    adapter_labels,
    base_name,
    first_line,
    refuse_prompt_tokens,
    with_adapter,
)
from pipeline.models.audit import missing_weights, refuse_missing, refuse_more_blocks
from pipeline.models.processors import FORM, SETTINGS, check_images, in_place_of_tokenizer, is_image_processor
from pipeline.models.saved import checkpoints, model_files
from pipeline.records import Tokenization
from pipeline.sources.files.told_apart import is_cache, missing_path, not_on_the_hub
from pipeline.tasks import Task, embedding_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer."""

    model: PreTrainedModel
    """May be wrapped in a `peft.PeftModel`."""
    tokenizer: PreTrainedTokenizerBase
    """For a model of images, its image processor: see `models.processors`."""
    name: str
    revision: str | None = None
    quantization: str | None = None
    compiler: str | None = None
    base_model: str | None = None
    """The `--base-model` that replaced the adapter's own base model."""
    new_weights: tuple[str, ...] = ()
    """Parameters that come from no file: those of a new head."""
    use_cache: bool | None = None
    """The configuration's original `use_cache`, which is False while the model is loaded; None if
    it has none."""
    file_dtype: torch.dtype | None = None
    """The dtype that the configuration states for the weights in the files."""


def load_model(
    task: Task,
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    device_map: str | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
    label_names: tuple[str, ...] | None = None,
    new_head: bool = False,
    trainable: bool = False,
    compiler: str | None = None,
    base_model: str | None = None,
) -> LoadedModel:
    """Load a model with the head of a task.

    Args:
        name: hub name, directory, PEFT adapter (a directory or a hub name), or GGUF file
            (`dir/file.gguf`, `org/name/file.gguf`).
        label_names: names of the classes of a new classification head.
        new_head: initialise a head that the checkpoint lacks. Otherwise a missing head is an error,
            since its logits would be noise.
        trainable: load a PEFT adapter for further training.
        compiler: backend of `torch.compile` for all but the head.
        base_model: name or directory of an adapter's base model, instead of the one that the
            adapter names.

    Raises:
        ModelError: the model cannot be loaded, or the weights in the files are not those of the
            model.
        MisuseError: a dtype or a compiler that does not exist.
    """
    adapter, folder = adapter_config(name, revision), adapter_folder(name, revision)
    base_model = None if base_model is None else os.path.expanduser(base_model)
    base = base_name(name, adapter, base_model)
    if adapter and label_names is None:
        label_names = adapter_labels(name, revision)
    try:
        source, kwargs = _locate(base)
        kwargs.update(revision=None if adapter else revision, trust_remote_code=trust_remote_code)
        config = _from_pretrained(AutoConfig, source, base, **kwargs)
    except ModelError as error:
        if adapter is None:
            raise
        raise ModelError(f"{name}: its base model is not found: {error}; name another with --base-model") from error
    stated = None if adapter else _stated_dtype(config)
    if label_names is not None:
        config.num_labels = len(label_names)
        config.id2label = dict(enumerate(label_names))
        config.label2id = {label: i for i, label in enumerate(label_names)}
    if task.problem_type is not None:
        if adapter is not None:
            raise ModelError(
                f"{name}: is an adapter, whose adapter_config.json does not record that the model {'gives scores' if task.target == 'score' else 'gives several labels at once'}; merge it into its base model first"
            )
        if new_head or config.problem_type is None:
            config.problem_type = task.problem_type
    options: dict[str, Any] = {"dtype": _dtype(dtype), "config": config, "output_loading_info": True}
    if new_head:
        options["ignore_mismatched_sizes"] = True  # for the head only: `missing_weights` refuses others
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if device_map is not None:
        options["device_map"] = device_map
    if quantization is not None or "gguf_file" in kwargs:
        options["quantization_config"] = _quantization(quantization)
    model, info = _from_pretrained(task.auto_class, source, base, **kwargs, **options)
    missing = missing_weights(model, base, info, new_head=new_head or adapter is not None)
    if "gguf_file" in kwargs:
        path = str(cached_file(source, kwargs["gguf_file"], revision=kwargs["revision"]))
        refuse_more_blocks(base, read_gguf_metadata(path)[1], config.get_text_config().num_hidden_layers)
    if folder is not None:
        model = with_adapter(model, name, folder, missing, base=base, trainable=trainable)
        refuse_prompt_tokens(model, name, marks_positions=task.marks_positions)
    else:
        refuse_missing(model, name, missing, new_head=new_head)
    commit = None if folder is None or Path(name).expanduser().exists() else folder.name
    own_tokenizer = folder is None or (folder / "tokenizer_config.json").exists()
    load = load_tokenizer if task.reads != "images" else load_processor
    tokenizer = load(
        name if own_tokenizer else base,
        revision=revision if own_tokenizer else None,
        trust_remote_code=trust_remote_code,
    )
    if device_map is None and quantization is None:
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    use_cache, model.config.use_cache = getattr(model.config, "use_cache", None), False
    model.eval()
    if task.reads == "images":
        check_images(task, model, tokenizer)
    if compiler is not None:
        _compile(model, compiler)
    return LoadedModel(
        model,
        tokenizer,
        name,
        revision or commit or getattr(config, "_commit_hash", None),
        quantization,
        compiler,
        base_model,
        () if adapter else missing,
        use_cache,
        stated,
    )


def _stated_dtype(config: Any) -> torch.dtype | None:
    stated = getattr(config, "dtype", None)
    found = getattr(torch, stated, None) if isinstance(stated, str) else stated
    return found if isinstance(found, torch.dtype) else None


@contextmanager
def as_it_came(loaded: LoadedModel) -> Iterator[None]:
    """Restore the original `use_cache` of the configuration while a model is saved."""
    config = loaded.model.config
    before = getattr(config, "use_cache", None)
    if loaded.use_cache is not None:
        config.use_cache = loaded.use_cache
    try:
        yield
    finally:
        config.use_cache = before


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        ModelError: it cannot be loaded.
    """
    source, kwargs = _locate(name)
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(
        AutoTokenizer, source, name, revision=revision, trust_remote_code=trust_remote_code, **kwargs
    )
    return tokenizer


def load_processor(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the image processor of a model, typed as a tokenizer.

    Raises:
        ModelError: it cannot be loaded.
    """
    source, kwargs = _locate(name)
    found = _from_pretrained(
        AutoImageProcessor, source, name, revision=revision, trust_remote_code=trust_remote_code, **kwargs, **FORM
    )
    return in_place_of_tokenizer(found)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, file: str | None) -> None:
    """Replace a tokenizer's chat template by the Jinja template in a file; None keeps it.

    Raises:
        MisuseError: the model reads images.
        ModelError: the file cannot be read.
    """
    if file is None:
        return
    if is_image_processor(tokenizer):
        raise MisuseError("--chat-template is for the chats of language models; leave it out")
    try:
        tokenizer.chat_template = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"--chat-template {file}: cannot be read ({error})") from None


def pad_id(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> int:
    """Return the token id to pad with, for which the model has an embedding.

    Padding is masked, so any token can be used if the tokenizer has no padding token.
    """
    if is_image_processor(tokenizer):
        return 0
    rows = 1 << 31 if model is None else embedding_rows(model)
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int) and candidate < rows:
            return candidate
    return 0


def check_isolation(model: Any, tokenization: Tokenization) -> None:
    """Refuse an attention implementation that crosses the documents of packed rows.

    Raises:
        MisuseError: flash attention, with which `transformers` isolates documents only in batches
            of one row.
    """
    if tokenization.isolate_documents and "flash" in str(getattr(model.config, "_attn_implementation", "")):
        raise MisuseError(
            "--isolate-documents needs the attention implementation sdpa or eager: flash attention isolates documents in batches of one row only"
        )


def choose_max_length(task: Task, loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase, asked: int | None) -> int:
    """Return the longest row in tokens: the requested length, or the task's default.

    The default is limited to what the model accepts.

    Raises:
        MisuseError: the requested length is more than the model accepts.
    """
    return length_within(task, loaded.name, longest_input(loaded.model, tokenizer), asked)


def length_within(task: Task, name: str, longest: int, asked: int | None) -> int:
    """Return `choose_max_length` for a model that accepts `longest` tokens."""
    if asked is not None and task.reads == "images":
        raise MisuseError(f"--max-length {asked}: is for texts; --task {task.name} reads images; leave it out")
    if asked is None:
        return min(longest, task.default_max_length)
    if asked > longest:
        raise MisuseError(f"--max-length {asked}: {name} takes at most {longest} tokens")
    return asked


def class_names(model: Any) -> tuple[str, ...]:
    """Return the class names of a model's head, in order."""
    return tuple(str(model.config.id2label[i]) for i in range(model.config.num_labels))


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest number of tokens that a model accepts."""
    return longest_of(model.config, tokenizer)


def longest_of(model_config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return `longest_input` from a model's configuration."""
    if is_image_processor(tokenizer):
        return 1
    config = model_config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 30
    if "roberta" in config.model_type or config.model_type in ("camembert", "longformer", "mpnet", "data2vec-text"):
        limit -= (config.pad_token_id or 0) + 1  # their positions start after the padding index
    return int(min(limit, tokenizer.model_max_length))


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Return the first argument of `from_pretrained` for a name, and `gguf_file` for a GGUF file.

    Raises:
        ModelError: a local path that does not exist or is a cache of soft labels.
    """
    if name.startswith("~"):
        name = str(Path(name).expanduser())
    if name.endswith(".gguf"):
        parent, _, file = name.rpartition("/")
        return parent or ".", {"gguf_file": file}
    looks_local = name.startswith((".", "/")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        what = missing_path(name) or "no such directory"
        raise ModelError(f"{name}: {what}; expected a model directory or a hub name (org/name)")
    if is_cache(Path(name)):
        raise ModelError(
            f"{name}: is a cache of soft labels (manifest.json), expected a model directory or a hub name; a cache is given with --cache"
        )
    return name, {}


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the configuration of a model, without its weights.

    Raises:
        ModelError: it cannot be loaded.
    """
    source, kwargs = _locate(name)
    return _from_pretrained(AutoConfig, source, name, revision=revision, trust_remote_code=trust_remote_code, **kwargs)


def _compile(model: Any, backend: str) -> None:
    """Compile a model's body with dynamic shapes, but not the head.

    The head is called with any number of positions.
    """
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        raise MisuseError(f"--torch-compile {backend}: expected one of {', '.join(torch.compiler.list_backends())}")
    body = model.get_base_model().base_model if hasattr(model, "peft_config") else model.base_model
    body.compile(backend=backend, dynamic=True)


def _quantization(kind: str | None) -> Any:
    if kind is None:
        from transformers import GgufConfig

        return GgufConfig(dequantize=True)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=kind == "4bit", load_in_8bit=kind == "8bit")


def _dtype(name: str) -> Any:
    if name == "auto":
        return name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise MisuseError(f"--dtype {name}: expected auto, float32, bfloat16 or float16")
    return dtype


def _from_pretrained(auto_class: Any, source: str, name: str, **kwargs: Any) -> Any:
    try:
        return auto_class.from_pretrained(source, **kwargs)
    except Exception as error:
        if not isinstance(error, UNLOADABLE) and type(error) is not Exception:  # from the library tokenizers
            raise
        missing = missing_path(name)
        if missing is not None:
            raise ModelError(
                f"{name}: {missing}; {not_on_the_hub('model')}, expected a model directory or a hub name (org/name)"
            ) from error
        said = first_line(error)
        if "Unrecognized configuration class" in said:
            kind = getattr(kwargs.get("config"), "model_type", "this type")
            raise ModelError(
                f"{name}: a model of the type {kind} cannot be loaded by {auto_class.__name__}; give another model, or the --task that it is for"
            ) from error
        if "ignore_mismatched_sizes" in said:
            raise ModelError(
                f"{name}: some weights have other shapes than {auto_class.__name__} gives them under its config.json: it is a model of another task, or its head has "
                "another number of classes; give the --task that it is for, or fine-tune it with train-teacher"
            ) from error
        if auto_class is AutoImageProcessor and Path(source).is_dir() and not Path(source, SETTINGS).exists():
            raise ModelError(
                f"{name}: no {SETTINGS} beside the model; save the image processor that belongs to it there: "
                "AutoImageProcessor.from_pretrained(BASE).save_pretrained(DIR)"
            ) from error
        where = (
            "" if Path(source).exists() else "; there is no such directory here either: give that of a downloaded model"
        )
        if Path(source).is_dir() and checkpoints(Path(source)) and not model_files(Path(source)):
            where = "; its training is not finished: run the command that trains it again"
        raise ModelError(f"{name}: cannot be loaded by {auto_class.__name__}: {first_line(error)}{where}") from error
