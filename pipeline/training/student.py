"""Load the student that is to be trained, and check that it fits the cache."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Sequence
from typing import Any

from pipeline.cache import Cache
from pipeline.cache.format.codec import LABEL_LOGPROBS
from pipeline.config import TrainStudentConfig
from pipeline.cross_tokenizer.opening import cache_for
from pipeline.errors import ContractError, MisuseError, ModelError, PipelineError
from pipeline.models import LoadedModel, check_isolation, class_names, load_model, longest_input, tokenizer_info
from pipeline.models.adapters import adapter_config, adapter_labels, base_name
from pipeline.models.load import load_config
from pipeline.models.processors import image_size, is_image_processor
from pipeline.records import Contract
from pipeline.tasks import TASKS, Task, get_task, may_lack_head

logger = logging.getLogger(__name__)


def caches_for_student(config: TrainStudentConfig, caches: Sequence[Cache]) -> list[Cache]:
    """Return the caches as the student reads them, aligned with its tokenizer if it is another.

    Raises:
        ContractError: the tokenizers cannot be aligned.
        MisuseError: `--align` does not apply to the caches, or the data for aligned spans is
            missing.
    """
    first, last = config.soft_weight, config.soft_weight_end
    teaches = first != 0 or bool(last) or config.hard_labels == "teacher"
    found = [
        cache_for(
            cache,
            config.student,
            config.split,
            trust_remote_code=config.trust_remote_code,
            base_model=config.base_model,
            cache_dir=config.cache_dir,
            teaches=teaches,
        )
        for cache in caches
    ]
    _check_align(config, found)
    return found


def _check_align(config: TrainStudentConfig, caches: Sequence[Cache]) -> None:
    """Refuse `--align` if there is nothing to align, or the data for aligned spans is missing.

    Raises:
        MisuseError: states which.
    """
    if config.align == "map":
        return
    for cache in caches:
        if get_task(cache.manifest.contract.task).other_tokenizers != "bytes":
            raise MisuseError(
                f"--align {config.align}: goes with language models, whose classes are tokens; leave it out"
            )
        if cache.vocabulary_map is None:
            raise MisuseError(
                f"--align {config.align}: is for students with another tokenizer, and {config.student} has that of {cache.where}; leave it out"
            )
        if LABEL_LOGPROBS not in cache.manifest.contract.columns:
            raise MisuseError(
                f"--align {config.align}: needs the teacher's log-probability of each token, and {cache.where} has no column {LABEL_LOGPROBS}; "
                "cache again with --store-label-logprobs"
            )


def load_student(
    contract: Contract,
    name: str,
    *,
    new_head: bool = True,
    trust_remote_code: bool = False,
    base_model: str | None = None,
) -> LoadedModel:
    """Load a student and check that it fits the cache.

    Args:
        new_head: add a new head to a classifier's checkpoint that has none.
        base_model: base model of an adapter, instead of the one that the adapter names.

    Raises:
        ContractError: another number or order of labels, or another tokenizer.
        ModelError: the model cannot be loaded.
    """
    task = get_task(contract.task)
    names = (
        None
        if contract.label_names is None or task.names in ("choices", "places")
        else _agreed_labels(contract.label_names, name, trust_remote_code, base_model)
    )
    student = load_model(
        task,
        name,
        dtype="float32",
        label_names=names,
        new_head=new_head and may_lack_head(task),
        trainable=True,
        trust_remote_code=trust_remote_code,
        base_model=base_model,
    )
    check_fit(task, contract, student)
    if student.new_weights:
        logger.info("%s: its files have no weights for %s: they start at random", name, ", ".join(_parts(student)))
    return student


def _parts(student: LoadedModel) -> list[str]:
    """Return the modules whose weights are in no file."""
    base = student.model.base_model_prefix
    return sorted(
        {
            name.rpartition(".")[0] if name.startswith(f"{base}.") else name.partition(".")[0]
            for name in student.new_weights
        }
    )


def add_adapter(task: Task, student: LoadedModel, config: TrainStudentConfig) -> LoadedModel:
    """Wrap the student in a new LoRA adapter (Hu et al., 2021).

    Only the adapter, and a head without trained weights, are trained.

    Raises:
        MisuseError: the student is an adapter already, or the task does not support one.
        ModelError: PEFT is not installed, or does not find the modules.
    """
    if hasattr(student.model, "peft_config"):
        raise MisuseError(
            f"--lora-r: {student.name} is an adapter already, which is trained further as it is; leave --lora-r out, or merge it into its base model first (PEFT: merge_and_unload)"
        )
    if task.peft_type is None:
        raise MisuseError(f"--lora-r: PEFT has no name for --task {task.name}; leave it out")
    if task.problem_type is not None:
        raise MisuseError(
            f"--lora-r: an adapter_config.json does not record that the model {'gives scores' if task.target == 'score' else 'gives several labels at once'}, so that it could not be loaded for --task {task.name}; leave it out"
        )
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ModelError("--lora-r needs PEFT: pip install 'soft-label-pipeline[lm]'") from None
    rank = config.lora_r or 0
    settings = LoraConfig(
        r=rank,
        lora_alpha=config.lora_alpha or 2 * rank,
        target_modules=list(config.lora_target) or None,
        task_type=task.peft_type,
        modules_to_save=_new_modules(student) or None,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # PEFT corrects it itself
            adapted: Any = get_peft_model(student.model, settings)
    except ValueError as error:
        raise ModelError(f"--lora-target: {' '.join(str(error).split())}") from None
    return dataclasses.replace(student, model=adapted)


def _new_modules(student: LoadedModel) -> list[str]:
    """Return the modules for `modules_to_save`; PEFT adds `classifier` and `score` itself."""
    return [name for name in _parts(student) if name not in ("classifier", "score")]


def check_fit(task: Task, contract: Contract, student: LoadedModel) -> None:
    """Refuse a student that does not fit the cache.

    Raises:
        ContractError: states what differs.
    """
    same_tokenizer = tokenizer_info(student.tokenizer).sha256 == contract.tokenizer.sha256
    if task.other_tokenizers == "bytes" and not same_tokenizer:
        raise ContractError(
            f"{student.name}: the student's tokenizer is not the cache's (expected {contract.tokenizer.vocabulary_size} tokens, sha256 "
            f"{contract.tokenizer.sha256[:12]}..., found {len(student.tokenizer)}); give it by name or path, so that its own tokenizer is read and aligned with the cache's"
        )
    if task.other_tokenizers is None and not same_tokenizer:
        what = "the places of tokens" if task.names == "places" else "hidden tokens"
        what = "the tokens of the targets" if task.label_source == "target" else what
        raise ContractError(
            f"{student.name}: the student has another tokenizer, and {what} are the teacher's; use a student with the cache's tokenizer (sha256 "
            f"{contract.tokenizer.sha256[:12]}...)"
        )
    stored = "position_words" in contract.columns if task.other_tokenizers == "words" else contract.store_text
    stored = stored or task.reads == "images"
    if not same_tokenizer and not stored:
        raise ContractError(
            f"{student.name}: the student has another tokenizer, and the cache stores no texts to tokenize with it; cache again with --store-text"
        )
    found = task.num_classes(student.model, student.tokenizer)
    if task.names == "positions" and contract.label_names != class_names(student.model):
        raise ContractError(
            f"{student.name}: expected the labels {', '.join(contract.label_names or ())}, as the cache has, found {', '.join(class_names(student.model))}"
        )
    if found < contract.num_classes or (task.names == "classes" and found != contract.num_classes):
        raise ContractError(f"{student.name}: expected {contract.num_classes} classes, as the cache has, found {found}")
    embedding: Any = student.model.get_input_embeddings() if task.predicts_tokens else None
    if embedding is not None and embedding.num_embeddings < contract.num_classes:
        raise ContractError(
            f"{student.name}: has an input embedding of {embedding.num_embeddings} tokens, expected at least {contract.num_classes}, as its output and the cache have; "
            "resize_token_embeddings makes both of one size"
        )
    check_isolation(student.model, contract.tokenization)
    _tell_of_own_processor(student, contract)
    longest = longest_input(student.model, student.tokenizer)
    if same_tokenizer and longest < contract.tokenization.max_length:
        raise ContractError(
            f"{student.name}: takes at most {longest} tokens, and the cache has rows of up to {contract.tokenization.max_length}; cache again with --max-length {longest}"
        )


def processor_of(student: LoadedModel) -> dict[str, str]:
    """Return the hash of the image processor for the record of a run; {} for a model of texts."""
    is_image = is_image_processor(student.tokenizer)
    return {"image_processor": tokenizer_info(student.tokenizer).sha256} if is_image else {}


def _tell_of_own_processor(student: LoadedModel, contract: Contract) -> None:
    """Log that the student's image processor differs from the teacher's."""
    if is_image_processor(student.tokenizer) and tokenizer_info(student.tokenizer).sha256 != contract.tokenizer.sha256:
        size = image_size(student.tokenizer)
        pixels = "" if size is None else f", {size[0]} x {size[1]} pixels"
        logger.info("%s: reads the images by its own image processor%s, not by the teacher's", student.name, pixels)


def _agreed_labels(
    expected: tuple[str, ...], name: str, trust_remote_code: bool, base_model: str | None
) -> tuple[str, ...]:
    """Return the cache's labels, after checking those that the student's configuration states.

    Raises:
        ContractError: the student has other labels, or the same in another order.
    """
    found = _stated_labels(name, trust_remote_code, base_model)
    if found is None:
        return expected
    generic = found == tuple(f"LABEL_{i}" for i in range(len(found)))
    if len(found) != len(expected):
        raise ContractError(
            f"{name}: expected {len(expected)} labels, as the cache has ({', '.join(expected[:5])}), found {len(found)} ({', '.join(found[:5])})"
        )
    if not generic and found != expected:
        i = next(i for i, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1])
        raise ContractError(
            f"{name}: label {i}: expected {expected[i]!r}, as in the cache, found {found[i]!r}; the soft labels would be assigned to the wrong labels"
        )
    return expected


def _stated_labels(name: str, trust_remote_code: bool, base_model: str | None) -> tuple[str, ...] | None:
    """Return the labels that a trained classifier states; None if it states none.

    An adapter has its own labels, or those of its base model if it brings no head.
    """
    adapter = adapter_config(name)
    if adapter is not None:
        if (kept := adapter_labels(name)) is not None:
            return kept
        kind = adapter.get("task_type")
        if any(
            kind is not None and task.peft_type == kind and task.names is not None for task in TASKS.values()
        ) or adapter.get("modules_to_save"):
            return None
    try:
        config = load_config(base_name(name, adapter, base_model), trust_remote_code=trust_remote_code)
    except PipelineError:
        return None  # load_model raises an error with the reason
    if not any("Classification" in architecture for architecture in config.architectures or ()):
        return None
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))
