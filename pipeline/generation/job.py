"""Preparation of a generation: everything that is fixed before the first shard, as a job."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from pipeline.cache.format.manifest import Layout, check_same_contract, dump
from pipeline.cache.format.schema import describe
from pipeline.cache.storage.commit import create_exclusively, full_disk, sweep
from pipeline.cache.storage.urls import is_url
from pipeline.cache.writing.build import keep_tokenizer
from pipeline.cache.writing.place import check_files, clear, plan_there
from pipeline.capture.plan import kept_types, library_versions, plan_shards
from pipeline.config import GenerateConfig
from pipeline.errors import MisuseError
from pipeline.generation.examples import label_prompts
from pipeline.generation.finish import clear_result, is_committed
from pipeline.generation.local import LocalWriter
from pipeline.generation.prompts import Prompts, row_prompts
from pipeline.generation.records import NAMES, GenerationContract, GenerationPlan, Prompt, Sampling
from pipeline.generation.schema import generated_schema
from pipeline.generation.writer import Writer, special_stops, stated_ends
from pipeline.models import LoadedModel, load_model, load_tokenizer, set_chat_template, tokenizer_info
from pipeline.records import BadRow, SourceInfo
from pipeline.servers.addresses import base_urls, server_key
from pipeline.sources import fingerprints
from pipeline.sources.files.loading import redact
from pipeline.tasks import Task, writing_task

logger = logging.getLogger(__name__)

#: Completions per shard without `--rows-per-shard`: minutes of work, which an interrupted run
#: loses.
_SHARD_COMPLETIONS = 250
#: Number of rows that the check of the model reads.
_LOOKED_AT = 16


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """All inputs of the shards; the same in every worker."""

    prompts: Prompts
    writer: Writer
    tokenizer: PreTrainedTokenizerBase
    plan: GenerationPlan
    schema: pa.Schema
    layout: Layout


def generation_layout(output: str | Path) -> Layout:
    """Return the layout of the output directory.

    Raises:
        MisuseError: the output is a URL.
    """
    if is_url(str(output)):
        raise MisuseError(f"{redact(str(output))}: generate writes to a directory; copy it from there")
    return Layout(Path(output), names=NAMES)


def prepare(
    config: GenerateConfig, *, dry_run: bool = False, live_model: LoadedModel | None = None, live_prompts: Any = None
) -> GenerationJob:
    """Build the job of `softlabel generate` from its flags, and start or join its output.

    Args:
        dry_run: read the output, but do not change it.
        live_model: used instead of `--model`.
        live_prompts: a `datasets.Dataset`, or a mapping of them, instead of `--dataset`.

    Raises:
        PipelineError: see the subclasses.
    """
    layout = generation_layout(config.output)
    check_files(layout, GenerationPlan, overwrite=config.overwrite)
    task = writing_task()
    tokenizer, writer = _writer(config, task, live_model)
    try:
        return _job(config, layout, tokenizer, writer, live_prompts, dry_run=dry_run)
    except BaseException:
        writer.close()
        raise


def _job(
    config: GenerateConfig,
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    writer: Writer,
    live_prompts: Any,
    *,
    dry_run: bool,
) -> GenerationJob:
    make_prompts = row_prompts if config.template is None else label_prompts
    prompts: Prompts = make_prompts(config, tokenizer, live=live_prompts)
    for stop, token in special_stops(tokenizer, config.stop).items():
        logger.info(
            "--stop %s is a special token (id %d): it ends a completion as EOS does, and is trained on", stop, token
        )
    if not writer.end_ids and not config.stop:
        logger.warning(
            "%s: has no end-of-sequence token, so that every completion is cut at --max-new-tokens; --stop TEXT ends them earlier",
            writer.name,
        )
    source = prompts.source
    kept = kept_types(source) if source is not None and config.template is None else {}
    schema = generated_schema(labelled=config.template is not None, kept=kept)
    contract = GenerationContract(
        model=writer.info(),
        tokenizer=tokenizer_info(tokenizer),
        source=None if source is None else _source_info(prompts, config),
        prompts=prompts.settings,
        sampling=_sampling(config),
        end_ids=writer.end_ids,
        dropped=config.dropped,
        batch_tokens=config.batch_tokens,
        on_bad_row=config.on_bad_row,
        versions=library_versions(),
        columns=describe(schema),
    )
    rows_per_shard = config.rows_per_shard or max(1, _SHARD_COMPLETIONS // config.num_samples)
    row_groups = source.row_groups if source is not None and config.template is None else {}
    plan = GenerationPlan(contract, plan_shards(prompts.ranges, rows_per_shard, row_groups=row_groups))
    if dry_run:
        there = None if config.overwrite else plan_there(layout, GenerationPlan)
        if there is not None:
            check_same_contract(plan, there, layout, work=NAMES.work)
    else:
        _begin(layout, plan, tokenizer, overwrite=config.overwrite)
    return GenerationJob(prompts, writer, tokenizer, plan, schema, layout)


def _sampling(config: GenerateConfig) -> Sampling:
    return Sampling(
        num_samples=config.num_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        stop=config.stop,
        seed=config.seed,
    )


def few_prompts(job: GenerationJob, count: int = _LOOKED_AT) -> list[Prompt]:
    """Return the usable prompts of the first rows."""
    first = job.plan.shards[0]
    found = job.prompts.read(first.split, first.start, min(first.start + count, first.stop))
    return [item for item in found if not isinstance(item, BadRow) and problem_of(job, item) is None]


def problem_of(job: GenerationJob, prompt: Prompt) -> str | None:
    """Return why the model cannot continue a prompt, or None if it can."""
    count, new = len(prompt.input_ids), job.plan.contract.sampling.max_new_tokens
    if not count:
        return "the prompt has no tokens; a model without a BOS token cannot continue it"
    if count + new > job.writer.longest:
        return (
            f"a prompt of {count:,} tokens and {new:,} new ones (--max-new-tokens) are more than the model takes, "
            f"{job.writer.longest:,}"
        )
    highest = int(prompt.input_ids.max())
    if highest >= job.writer.num_ids:
        return f"token id {highest} has no row in the input embedding, which has {job.writer.num_ids}"
    return None


def _writer(
    config: GenerateConfig, task: Task, live_model: LoadedModel | None
) -> tuple[PreTrainedTokenizerBase, Writer]:
    """Load the tokenizer, and load the model or connect to its servers."""
    if config.server:
        from pipeline.generation.served import served_writer  # imports an HTTP library
        from pipeline.servers.client import Client

        client = Client(
            base_urls(config.server),
            key=server_key(),
            concurrency=config.concurrency,
            patience=config.server_patience,
        )
        try:
            tokenizer = load_tokenizer(
                config.model, revision=config.model_revision, trust_remote_code=config.trust_remote_code
            )
            set_chat_template(tokenizer, config.chat_template)
            stated = stated_ends(config.model, config.model_revision)
            return tokenizer, served_writer(
                client, tokenizer, model=config.server_model, sampling=_sampling(config), stated_ends=stated
            )
        except BaseException:
            client.close()
            raise
    loaded = live_model or _load(task, config)
    set_chat_template(loaded.tokenizer, config.chat_template)
    return loaded.tokenizer, LocalWriter(task, loaded, config.stop)


def _load(task: Task, config: GenerateConfig) -> LoadedModel:
    return load_model(
        task,
        config.model,
        revision=config.model_revision,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        device_map=config.device_map,
        quantization=config.quantization,
        trust_remote_code=config.trust_remote_code,
        base_model=config.base_model,
    )


def _source_info(prompts: Prompts, config: GenerateConfig) -> SourceInfo:
    source = prompts.source
    assert source is not None
    ranges = prompts.ranges if config.template is None else None
    return SourceInfo(
        source.name,
        source.config,
        source.revision,
        source.columns,
        fingerprints(source, ranges),
        rows=config.row_range,
    )


def _begin(layout: Layout, plan: GenerationPlan, tokenizer: PreTrainedTokenizerBase, *, overwrite: bool) -> None:
    """Create the output directory, or join an existing run of the same plan.

    Raises:
        ContractError: the directory holds a run of another plan.
        CacheError: the directory holds something else, or cannot be written.
    """
    if overwrite:
        check_files(layout, GenerationPlan, overwrite=True)
        clear_result(layout)
        clear(layout)
    found = check_files(layout, GenerationPlan)
    if found is not None or not create_exclusively(layout.plan, dump(plan)):
        check_same_contract(plan, found or plan_there(layout, GenerationPlan) or plan, layout, work=NAMES.work)
    if is_committed(layout, plan):
        shutil.rmtree(layout.data, ignore_errors=True)  # left by an interrupted commit
        return
    try:
        for directory in (layout.data, layout.plan.parent, layout.root):
            directory.mkdir(exist_ok=True)
            sweep(directory)
    except OSError as error:
        raise full_disk(layout.root, error) from error
    keep_tokenizer(layout, tokenizer)
