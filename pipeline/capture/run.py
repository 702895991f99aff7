"""The recipe of stage 1."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.cache import Cache, Plan
from pipeline.cache.build import begin, finish, is_finished, withdraw
from pipeline.cache.claims import claimed, finished
from pipeline.cache.schema import cache_schema, describe
from pipeline.capture.plan import (
    MAX_ROW_BYTES,
    default_rows_per_shard,
    full_row_is_too_large,
    kept_types,
    library_versions,
    plan_shards,
)
from pipeline.capture.shard import Job, capture_shard, forward, read_shard
from pipeline.capture.space import warn_of_full_disk
from pipeline.config import CacheLogitsConfig, DataConfig, EstimateConfig
from pipeline.errors import CacheError, MisuseError, ModelError
from pipeline.models import (
    LoadedModel,
    check_isolation,
    choose_max_length,
    load_model,
    model_info,
    pad_id,
    set_chat_template,
    tokenizer_info,
)
from pipeline.records import Columns, Contract, Encoding, Full, SourceInfo, Tokenization
from pipeline.sources import LabelMap, Source, fingerprints, from_datasets, load_source
from pipeline.tasks import Task, get_task

logger = logging.getLogger(__name__)


def run(config: CacheLogitsConfig) -> Cache:
    """`softlabel cache-logits`.

    Raises:
        PipelineError: see the subclasses; nothing is half-written, and the same command goes on where it stopped.
    """
    task = get_task(config.task)
    _check_output(config.output)
    task.check_columns(config.data.columns, config.data.tokenization(2))
    source = load_source(config.data)
    teacher = load_teacher(task, config)
    tokenizer = teacher.tokenizer
    return capture(
        task,
        source,
        teacher,
        tokenizer,
        Path(config.output),
        encoding=config.resolve_encoding(task.default_encoding.kind),
        tokenization=config.data.tokenization(choose_max_length(task, teacher, tokenizer, config.data.max_length)),
        store_text=config.data.store_text,
        store_entropy=config.store_entropy,
        batch_tokens=config.batch_tokens or task.default_batch_tokens,
        rows_per_shard=config.rows_per_shard,
        seed=config.seed,
        on_bad_row=config.on_bad_row,
        overwrite=config.overwrite,
    )


def load_teacher(task: Task, config: CacheLogitsConfig | EstimateConfig) -> LoadedModel:
    """The teacher that the flags name, with the chat template that they give it."""
    teacher = load_model(
        task,
        config.teacher,
        revision=config.teacher_revision,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        device_map=config.device_map,
        quantization=config.quantization,
        trust_remote_code=config.trust_remote_code,
    )
    set_chat_template(teacher.tokenizer, config.data.chat_template)
    return teacher


def cache_logits(
    teacher: str | Path | PreTrainedModel,
    dataset: Any,
    output: str | Path,
    *,
    task: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    encoding: Encoding | None = None,
    columns: Columns = Columns(),  # noqa: B008 - frozen
    max_length: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Cache:
    """Run a teacher over a data set and write its soft labels.

    Args:
        teacher: a name, a path, or a live model (then with its `tokenizer`).
        dataset: a `datasets.Dataset` or `DatasetDict`, or a name or path that `softlabel cache-logits --dataset` takes.
        task: `sequence-classification` or `causal-lm`.
        encoding: default: `Full()` for classifiers, `Sampled()` for language models.
        settings: packing, isolate_documents, store_text, store_entropy, batch_tokens, rows_per_shard, on_bad_row, overwrite.

    Returns:
        The finished cache. Called again with the same arguments it goes on where it was stopped.

    Raises:
        PipelineError: see the subclasses.
    """
    chosen = get_task(task)
    _check_output(str(output))
    if isinstance(teacher, str | Path):
        loaded = load_model(chosen, str(teacher))
    else:
        if tokenizer is None:
            raise MisuseError("cache_logits: a live model needs its tokenizer=...")
        teacher.eval()
        if teacher.config.pad_token_id is None:  # decoder-only classifiers find a row's end by it
            teacher.config.pad_token_id = pad_id(tokenizer)
        loaded = LoadedModel(teacher, tokenizer, teacher.config.name_or_path or type(teacher).__name__)
    tokenizer = tokenizer or loaded.tokenizer
    tokenization = Tokenization(
        max_length=choose_max_length(chosen, loaded, tokenizer, max_length),
        packing=settings.pop("packing", False),
        isolate_documents=settings.pop("isolate_documents", False),
    )
    chosen.check_columns(columns, tokenization)
    source = (
        _named_source(str(dataset), columns) if isinstance(dataset, str | Path) else from_datasets(dataset, columns)
    )
    settings = {
        "batch_tokens": chosen.default_batch_tokens,
        "encoding": encoding or chosen.default_encoding,
        **settings,
    }
    return capture(chosen, source, loaded, tokenizer, Path(output), tokenization=tokenization, seed=seed, **settings)


def capture(
    task: Task,
    source: Source,
    teacher: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    encoding: Encoding,
    tokenization: Tokenization,
    batch_tokens: int,
    seed: int,
    store_text: bool = True,
    store_entropy: bool = False,
    rows_per_shard: int | None = None,
    on_bad_row: Any = "stop",
    overwrite: bool = False,
) -> Cache:
    """Plan, make every shard that is not there yet, commit."""
    num_classes = task.num_classes(teacher.model, tokenizer)
    check_isolation(teacher.model, tokenization)
    _check_row_bytes(task, encoding, num_classes, tokenization.max_length)
    label_names = None if task.classes_are_tokens else _label_names(teacher.model)
    schema = cache_schema(
        encoding,
        num_classes,
        token_classes=task.classes_are_tokens,
        token_type_ids="token_type_ids" in tokenizer.model_input_names and not task.classes_are_tokens,
        text=store_text and not task.classes_are_tokens,
        text_pair=source.columns.text_pair is not None,
        documents=tokenization.isolate_documents,
        entropy=store_entropy,
        kept=kept_types(source),
    )
    contract = Contract(
        task=task.name,
        encoding=encoding,
        num_classes=num_classes,
        label_names=label_names,
        teacher=model_info(teacher),
        tokenizer=tokenizer_info(tokenizer),
        source=SourceInfo(
            source.name, source.config, source.revision, source.columns, fingerprints(source), source.holdout
        ),
        tokenization=tokenization,
        store_text=store_text,
        batch_tokens=batch_tokens,
        seed=seed,
        versions=library_versions(),
        columns=describe(schema),
        on_bad_row=on_bad_row,
    )
    per_shard = rows_per_shard or default_rows_per_shard(
        encoding, num_classes, max_length=tokenization.max_length, token_classes=task.classes_are_tokens
    )
    plan = Plan(contract, plan_shards(source, per_shard))
    labels = None if label_names is None else LabelMap.for_names(source, label_names)
    layout = begin(output, plan, tokenizer, overwrite=overwrite)
    job = Job(task, source, labels, teacher, tokenizer, plan, schema, layout)
    waiting = [
        shard for shard in plan.shards if finished(layout, shard) is None
    ]  # damaged ones of a finished cache too
    if not waiting and is_finished(layout, plan):
        logger.info("%s is finished already; nothing to do", output)
        return Cache.open(output)
    withdraw(layout, waiting)
    if waiting:
        warn_of_full_disk(job, waiting)
        check_head(job)
    with tqdm(
        total=sum(s.stop - s.start for s in plan.shards), unit="row", desc="cache-logits", disable=None
    ) as progress:
        progress.update(sum(s.stop - s.start for s in plan.shards) - sum(s.stop - s.start for s in waiting))
        for shard in claimed(layout, plan, waiting):
            capture_shard(job, shard)
            progress.update(shard.stop - shard.start)
    return finish(layout, plan)


def check_head(job: Job) -> None:
    """Compare the logits of one short row with those of the model's plain path.

    Raises:
        ModelError: they differ by more than the precision explains.
    """
    first = job.plan.shards[0]
    few = type(first)(first.name, first.split, first.start, min(first.start + 16, first.stop))
    examples, _ = read_shard(job, few)
    if not examples:
        return
    shortest = min(examples, key=lambda example: example.num_tokens)
    if shortest.num_tokens > 64:
        return
    model = job.teacher.model
    inputs, supervised = job.task.collate([shortest], 0)
    with torch.inference_mode():
        plain = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits
    if supervised is not None:
        plain = plain[supervised.to(model.device)]
    plain = plain[:, : job.plan.contract.num_classes].float()
    found = forward(job, [shortest]).float()
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    finite = plain.isfinite()  # logits that are not are told row by row, later
    if not bool(finite.any()):
        return
    worst = float((plain - found)[finite].abs().max() / plain[finite].abs().max().clamp_min(1.0))
    if not worst <= tolerance:
        raise ModelError(
            f"{job.teacher.name}: logits of the supervised positions alone differ from the model's own by {worst:.2g} (expected at most {tolerance:g}); this architecture "
            "cannot be cached safely: please report it"
        )


def _check_output(output: str) -> None:
    if "://" in output:
        raise CacheError(
            f"--output {output}: caches are written to local directories; copy the finished one from there"
        )


def _check_row_bytes(task: Task, encoding: Encoding, num_classes: int, max_length: int) -> None:
    if isinstance(encoding, Full) and full_row_is_too_large(task, num_classes, max_length):
        raise MisuseError(
            f"--encoding full: a row of {max_length} tokens over {num_classes} classes takes {2 * num_classes * max_length >> 20} MB, expected at most {MAX_ROW_BYTES >> 20}; "
            "use --encoding sampled (unbiased, some 25 bytes a position) or top-k, or a smaller --max-length"
        )


def _label_names(model: PreTrainedModel) -> tuple[str, ...]:
    config: Any = model.config
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def _named_source(name: str, columns: Columns) -> Source:
    data = DataConfig(
        dataset=name,
        text_column=columns.text or "text",
        text_pair_column=columns.text_pair,
        messages_column=columns.messages,
        prompt_column=columns.prompt,
        completion_column=columns.completion,
        input_ids_column=columns.input_ids,
        labels_column=columns.labels,
        label_column=columns.label or "label",
        keep_column=columns.keep,
    )
    return load_source(data)
