"""The recipe of stage 1."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.cache import Cache, Layout, Plan
from pipeline.cache.format.manifest import load_manifest
from pipeline.cache.writing.build import finish, is_finished, missing, open_layout, opened, refresh, withdraw
from pipeline.cache.writing.claims import Claims, finished
from pipeline.capture.job import Job, make_job, prepare
from pipeline.capture.shard import capture_shards, forward, read_shard
from pipeline.capture.space import warn_of_full_disk
from pipeline.config import CacheLogitsConfig, DataConfig
from pipeline.errors import MisuseError, ModelError
from pipeline.models import LoadedModel, choose_max_length, load_model, pad_id
from pipeline.records import Columns, Encoding, Receipt, ShardPlan, Tokenization
from pipeline.sources import Source, from_datasets, load_source
from pipeline.tasks import get_task

logger = logging.getLogger(__name__)


def run(config: CacheLogitsConfig) -> Cache | None:
    """`softlabel cache-logits`: with the engine that the flags name.

    Returns:
        The finished cache; None: this part of it is done, and others are not.

    Raises:
        PipelineError: see the subclasses; nothing is half-written, and the same command goes on where it stopped.
    """
    if config.engine == "ray":
        from pipeline.capture.engines.on_ray import run_on_ray

        return run_on_ray(config)
    if config.num_workers is not None:
        from pipeline.capture.engines.workers import run_workers

        return run_workers(config, config.num_workers)
    return capture(prepare(config), part=config.parsed_part)


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
        settings: packing, isolate_documents, store_text, store_entropy, batch_tokens, rows_per_shard, rows, on_bad_row, overwrite, append.

    Returns:
        The finished cache. Called again with the same arguments it goes on where it was stopped.

    Raises:
        PipelineError: see the subclasses.
    """
    chosen = get_task(task)
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
    job = make_job(
        chosen, source, loaded, tokenizer, open_layout(output), tokenization=tokenization, seed=seed, **settings
    )
    cache = capture(job)
    assert cache is not None  # no part was left out
    return cache


def capture(job: Job, *, part: tuple[int, int] | None = None) -> Cache | None:
    """Make every shard (of a part) that is not there yet, in this process; commit where none is missing then."""
    waiting = outstanding(job.layout, job.plan, part)
    if not waiting and is_finished(job.layout, job.plan):
        return already(job.layout)
    if waiting:
        warn_of_full_disk(job, waiting)
        check_head(job)
    with progress_bar(job.plan, waiting, part) as bar, Claims(job.layout, job.plan) as claims:

        def done(receipt: Receipt) -> None:
            claims.release(receipt.plan.name)
            bar.update(receipt.plan.stop - receipt.plan.start)

        capture_shards(job, claims.take(waiting), done)
    return finish_when_whole(job.layout, job.plan)


def outstanding(layout: Layout, plan: Plan, part: tuple[int, int] | None = None) -> list[ShardPlan]:
    """The shards of a part that are still to be made, damaged ones of a finished cache too."""
    refresh(layout)
    waiting = [shard for shard in shards_of(plan, part) if finished(layout, shard) is None]
    is_its_own = plan.parent is None or _cache_id(layout) != plan.parent.cache_id
    if is_its_own:  # while rows are appended, the manifest is that of the cache before, which stands
        withdraw(layout, waiting)
    return waiting


def _cache_id(layout: Layout) -> str | None:
    return load_manifest(layout.root).cache_id if layout.manifest.is_file() else None


def shards_of(plan: Plan, part: tuple[int, int] | None) -> Sequence[ShardPlan]:
    """Part I of N: every N-th shard from I on."""
    return plan.shards if part is None else plan.shards[part[0] :: part[1]]


def already(layout: Layout) -> Cache:
    """The cache that was finished before."""
    logger.info("%s is finished already; nothing to do", layout.name)
    return opened(layout)


def finish_when_whole(layout: Layout, plan: Plan) -> Cache | None:
    """Commit, where no shard is missing: whoever finds all receipts does it."""
    absent = missing(layout, plan)
    if absent:
        logger.info(
            "%s: %d of %d shards are still to be made, by other parts", layout.name, len(absent), len(plan.shards)
        )
        return None
    return finish(layout, plan)


def progress_bar(plan: Plan, waiting: Sequence[ShardPlan], part: tuple[int, int] | None = None) -> tqdm[Any]:
    """Source rows, those of finished shards counted already."""
    total, left = (sum(shard.stop - shard.start for shard in shards) for shards in (shards_of(plan, part), waiting))
    return tqdm(total=total, initial=total - left, unit="row", desc="cache-logits", disable=None)


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
