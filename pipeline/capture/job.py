"""Preparation of a capture: everything that is fixed before the first shard, as a `Job`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from pipeline.cache import Layout, Plan
from pipeline.cache.format.manifest import check_same_contract
from pipeline.cache.format.schema import cache_schema, describe
from pipeline.cache.writing.build import begin, note_contents
from pipeline.cache.writing.place import check_place, clear, current_plan, open_layout
from pipeline.capture.append import appended, new_ranges
from pipeline.capture.permutation import check_class_order, try_judge
from pipeline.capture.plan import (
    MOST_FILES,
    check_encoding,
    check_images_stored,
    check_stored,
    choices_of,
    default_rows_per_shard,
    judges_task,
    kept_types,
    library_versions,
    plan_shards,
    ranges_of,
    text_columns,
)
from pipeline.capture.teachers.judge.local import LocalScorer
from pipeline.capture.teachers.judge.scorer import Scorer
from pipeline.capture.teachers.judge.served import ServedScorer
from pipeline.capture.teachers.judge.teacher import make_judge
from pipeline.capture.teachers.local import LocalTeacher
from pipeline.capture.teachers.protocol import Teacher
from pipeline.capture.teachers.served import ServedTeacher, serve
from pipeline.capture.written import check_written_ids
from pipeline.config import CacheLogitsConfig, EstimateConfig
from pipeline.errors import CacheError, MisuseError
from pipeline.models import LoadedModel, length_within, load_model, load_tokenizer, set_chat_template, tokenizer_info
from pipeline.models.saved import trained_length
from pipeline.records import Contract, Encoding, SourceInfo, Tokenization
from pipeline.sources import (
    LabelMap,
    Labels,
    Source,
    holds_chats,
    is_of_files,
    label_reader,
    list_starts,
    load_source,
    load_unlabelled,
    survey,
    with_unlabelled,
)
from pipeline.tasks import Task, check_columns, get_task, label_column

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """All that `capture_shards` needs except the shards; the same in every worker."""

    task: Task
    source: Source
    labels: Labels | None
    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    schema: pa.Schema
    layout: Layout


def prepare(config: CacheLogitsConfig, *, dry_run: bool = False) -> Job:
    """Build the job of `softlabel cache-logits` from its flags, and start or join its output.

    Args:
        dry_run: read the output, but do not change it.

    Raises:
        PipelineError: see the subclasses.
    """
    task = get_task(config.task)
    settings = config.data.tokenization(2)
    if config.judging is not None:  # the arguments are those of the prompt's chat template
        settings = dataclasses.replace(settings, chat_template_kwargs=())
    check_columns(task, config.data.columns, settings)
    texts, logprobs = config.data.store_text, config.store_label_logprobs
    check_stored(task, config.data.columns, settings, store_text=texts, store_label_logprobs=logprobs)
    layout = open_layout(config.output)
    source = with_unlabelled(load_source(config.data), load_unlabelled(config.unlabelled, config.data))
    encoding = config.resolve_encoding(task.default_encoding.kind)
    begun = None if config.overwrite else current_plan(layout)
    teacher = teacher_of(task, config, source, begun)
    try:
        if config.data.input_ids_column is not None:
            check_written_ids(config.data.dataset, teacher.tokenizer, teacher.name)
        length = row_length(task, teacher, config.data.max_length, begun)
        return make_job(
            task,
            source,
            teacher,
            layout,
            encoding=encoding,
            tokenization=config.data.tokenization(length),
            store_text=config.data.store_text,
            store_images=config.data.store_images,
            store_entropy=config.store_entropy,
            store_label_logprobs=config.store_label_logprobs,
            batch_tokens=config.batch_tokens or (None if config.auto_batch_tokens else task.default_batch_tokens),
            rows_per_shard=config.rows_per_shard,
            rows=config.row_range,
            seed=config.seed,
            on_bad_row=config.on_bad_row,
            overwrite=config.overwrite,
            append=config.append,
            label_map=config.data.label_map,
            dry_run=dry_run,
        )
    except BaseException:
        teacher.close()
        raise


def teacher_of(task: Task, config: CacheLogitsConfig, source: Source, begun: Plan | None) -> Teacher:
    """Load the teacher that the flags select.

    Args:
        source: the rows to label; a judge takes its label names and examples from it.
        begun: the plan of an existing capture; a judge keeps its examples.
    """
    tokenizer = None
    if config.server and task.reads != "tokens":
        raise MisuseError(
            f"--server: servers give probabilities of next tokens only; --task {task.name} needs local weights; leave it out"
        )
    if config.server:
        tokenizer = load_tokenizer(
            config.teacher, revision=config.teacher_revision, trust_remote_code=config.trust_remote_code
        )
        set_chat_template(tokenizer, config.data.chat_template)
    if config.judging is not None:
        scorer = _scorer_of(judges_task(task), config, tokenizer)
        arguments = config.data.tokenization(2).chat_template_kwargs
        return make_judge(
            scorer,
            config.judging,
            source,
            label_map=config.data.label_map,
            seed=config.seed,
            chat_arguments=arguments,
            begun=None if begun is None else begun.contract,
        )
    if tokenizer is not None:
        return _serve(task, config, tokenizer, config.top_logprobs)
    loaded = load_teacher(task, config)
    return LocalTeacher(task, loaded, loaded.tokenizer, choices_of(task, source))


def _serve(
    task: Task, config: CacheLogitsConfig, tokenizer: PreTrainedTokenizerBase, top_logprobs: int
) -> ServedTeacher:
    return serve(
        task,
        config.teacher,
        tokenizer,
        config.server,
        model=config.server_model,
        api=config.server_api,
        concurrency=config.concurrency,
        patience=config.server_patience,
        top_logprobs=top_logprobs,
        check_with=config.check_with,
        revision=config.teacher_revision,
        trust_remote_code=config.trust_remote_code,
    )


def _scorer_of(task: Task, config: CacheLogitsConfig, tokenizer: PreTrainedTokenizerBase | None) -> Scorer:
    """Load the language model of a judge.

    Args:
        task: the task of the language model.
        tokenizer: of a served model; None: the model runs locally.
    """
    if tokenizer is not None:
        return ServedScorer(_serve(task, config, tokenizer, 1))
    return LocalScorer(load_teacher(task, config), config.batch_tokens or get_task(config.task).default_batch_tokens)


def row_length(task: Task, teacher: Teacher, asked: int | None, begun: Plan | None = None) -> int:
    """Return the largest row length: as given, as the teacher was trained, or the task's default.

    Args:
        begun: the plan of an existing capture. One of an earlier version keeps the task's default.

    Raises:
        MisuseError: the given length is more than the teacher accepts.
    """
    usual = length_within(task, teacher.name, teacher.longest_input, asked)
    trained = trained_length(teacher.name) if task.reads != "images" else None
    if asked is not None or trained is None:
        return usual
    if begun is not None and begun.contract.tokenization.max_length == usual:
        return usual
    length = min(trained, teacher.longest_input)
    logger.info(
        "rows of at most %d tokens, as %s was trained on; --max-length sets another length", length, teacher.name
    )
    return length


def load_teacher(task: Task, config: CacheLogitsConfig | EstimateConfig) -> LoadedModel:
    """Load the teacher that the flags select, and set the chat template that they give."""
    teacher = load_model(
        task,
        config.teacher,
        revision=config.teacher_revision,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        device_map=config.device_map,
        quantization=config.quantization,
        trust_remote_code=config.trust_remote_code,
        compiler=config.torch_compile,
        base_model=config.base_model,
    )
    set_chat_template(teacher.tokenizer, config.data.chat_template)
    return teacher


def make_job(
    task: Task,
    source: Source,
    teacher: Teacher,
    layout: Layout,
    *,
    encoding: Encoding,
    tokenization: Tokenization,
    batch_tokens: int | None,
    seed: int,
    store_text: bool | None = None,
    store_images: bool | None = None,
    store_entropy: bool = False,
    store_label_logprobs: bool = False,
    rows_per_shard: int | None = None,
    rows: tuple[int, int | None] | None = None,
    on_bad_row: Any = "stop",
    overwrite: bool = False,
    append: bool = False,
    label_map: Sequence[str] = (),
    dry_run: bool = False,
) -> Job:
    """Build the contract, plan and output of one capture.

    Args:
        batch_tokens: None: measure the fastest, or use that of the capture that is joined.
        store_text: None: the task's default; classifiers store texts, language models do not.
        rows: the source rows `[start, stop)` of each split; None: all.
        append: add the rows that a finished cache of the first rows does not have.
        label_map: `DATA=MODEL` each; if given, the order of the classes is not compared with the
            teacher's.
        dry_run: read the output, but do not change it.
    """
    tokenizer, num_classes = teacher.tokenizer, teacher.num_classes
    check_stored(
        task,
        source.columns,
        tokenization,
        store_text=store_text,
        store_label_logprobs=store_label_logprobs,
        fast_tokenizer=getattr(tokenizer, "is_fast", False),
    )
    if task.names == "places":
        num_classes = tokenization.max_length
    tokenization = teacher.settle(task.settle(tokenization, tokenizer, chats=holds_chats(source)))
    teacher.check(encoding, tokenization, store_entropy=store_entropy)
    check_encoding(task, encoding, num_classes, tokenization.max_length)
    label_names = teacher.label_names
    schema = cache_schema(
        encoding,
        num_classes,
        labels=task.label_source,
        marks_positions=task.marks_positions,
        token_type_ids="token_type_ids" in tokenizer.model_input_names and task.takes_token_types,
        **text_columns(task, store_text, chats=holds_chats(source)),
        text_pair=source.columns.text_pair is not None,
        images=task.reads == "images",
        views=tokenization.views is not None,
        image_files=check_images_stored(task, store_images),
        groups=source.columns.group is not None,
        documents=tokenization.isolate_documents or tokenization.num_choices is not None,
        entropy=store_entropy,
        label_logprobs=store_label_logprobs,
        kept=kept_types(source),
    )
    ranges = ranges_of(source, rows)
    begun = None if overwrite else current_plan(layout)
    # Earlier versions fingerprinted the rows of Parquet files; keep doing so for such a cache.
    by_contents = begun is not None and not any(map(is_of_files, begun.contract.source.fingerprints.values()))
    found_in_source = survey(source, ranges, by_contents=by_contents)
    row_groups = list_starts(source) or ({} if by_contents else source.row_groups)
    labels = _label_map(task, source, label_names, label_map)
    of_classes = labels if isinstance(labels, LabelMap) else None
    compare = partial(check_class_order, task, source, of_classes, teacher, encoding, tokenization)
    info = teacher.info
    # Only the process that makes the plan checks this; those that join or resume do not.
    if begun is None and info.judge is not None:
        tried = partial(try_judge, task, source, of_classes, teacher, encoding, tokenization)
        tried(ranges, batch_tokens or task.default_batch_tokens, compare_order=not label_map)
    elif not label_map and begun is None:
        compare(ranges, batch_tokens or task.default_batch_tokens)
    if overwrite and not dry_run:
        clear(layout)
    found = None if overwrite and dry_run else current_plan(layout)
    if append and found is not None and layout.outbox is not None:
        raise CacheError(f"{layout.name}: --append needs a local directory; pull the cache, append, and push it")
    if batch_tokens is None:
        measured = None if found else teacher.fastest_batch_tokens(tokenization)
        found = found or (None if dry_run else current_plan(layout))  # another part may have chosen
        batch_tokens = measured if found is None else found.contract.batch_tokens
        assert batch_tokens is not None
    contract = Contract(
        task=task.name,
        encoding=encoding,
        num_classes=num_classes,
        label_names=label_names,
        teacher=info,
        tokenizer=tokenizer_info(tokenizer),
        source=SourceInfo(
            source.name,
            source.config,
            source.revision,
            source.columns,
            found_in_source.fingerprints,
            source.holdout,
            rows,
            () if labels is None else labels.contract_form,
            source.unlabelled,
        ),
        tokenization=tokenization,
        store_text=store_text is not False,
        batch_tokens=batch_tokens,
        seed=seed,
        versions=library_versions(),
        columns=describe(schema),
        on_bad_row=on_bad_row,
    )
    per_shard = rows_per_shard or default_rows_per_shard(task, encoding, num_classes, tokenization)
    plan = Plan(contract, plan_shards(ranges, per_shard, row_groups=row_groups))
    if begun is None and len(plan.shards) > MOST_FILES:
        logger.warning(
            "%s: %s shards of %s rows; the Hub takes %s files in a folder: --rows-per-shard %d makes as many",
            *(layout.name, f"{len(plan.shards):,}", f"{per_shard:,}", f"{MOST_FILES:,}"),
            -(-sum(stop - start for start, stop in ranges.values()) // MOST_FILES),
        )
    if append and found is not None:
        plan = appended(layout, found, plan, source, per_shard, row_groups)
        if not label_map and plan.parent is not None and plan != found:
            compare(new_ranges(plan, plan.parent), batch_tokens, append=True)
    if dry_run:
        there = check_place(layout, plan, overwrite=overwrite)
        if there is not None and plan.parent is None:
            check_same_contract(plan, there, layout)
    else:
        layout = begin(layout, plan, tokenizer)
        note_contents(layout, plan, found_in_source.contents)
    return Job(task, source, labels, teacher, tokenizer, plan, schema, layout)


def _label_map(task: Task, source: Source, names: tuple[str, ...] | None, label_map: Sequence[str]) -> Labels | None:
    """Return how the data's labels become classes; None if the classes are tokens or choices.

    Raises:
        MisuseError: a label map is given, but there are no class labels.
    """
    if names is None or task.names == "choices":
        if label_map:
            raise MisuseError(
                f"--label-map goes with class labels; here the classes are {'choices' if names else 'tokens'}"
            )
        if names and source.columns.label is None:
            logger.warning(
                "%s: no label column: the cache will have no hard labels; name it with --label-column", source.name
            )
        return None
    if source.columns.label is None and names != tuple(f"LABEL_{i}" for i in range(len(names))):
        found = dict.fromkeys(name for dataset in source.splits.values() for name in dataset.column_names)
        logger.warning(
            "%s: no label column, found %s: the cache will have no hard labels for the teacher's classes (%s); if the data has some, name them with --label-column",
            *(source.name, ", ".join(found), ", ".join(names[:5])),
        )
    return label_reader(source, names, label_map, holds=label_column(task))
