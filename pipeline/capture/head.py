"""Compare the head on supervised positions with the model's plain path, before the first shard."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from pipeline.cache.views.tokens import marked_tokens
from pipeline.capture.job import Job
from pipeline.capture.shard import forward, read_shard
from pipeline.errors import ModelError
from pipeline.progress import track
from pipeline.records import ShardPlan
from pipeline.sources import holds_chats
from pipeline.tasks import check_ids, embedding_rows
from pipeline.tasks.chats import supervision

logger = logging.getLogger(__name__)


def show_first_row(job: Job) -> None:
    """Log the first row as tokens, those that are predicted in brackets, so that a wrong template or mask is seen now."""
    first = job.plan.shards[0]
    few = type(first)(first.name, first.split, first.start, min(first.start + 1, first.stop))
    examples = read_shard(job, few).examples
    if holds_chats(job.source):
        logger.info("chats: %s", supervision(job.plan.contract.tokenization, job.tokenizer))
    for example in examples[:1]:
        tokens = marked_tokens(job.tokenizer, example.input_ids.tolist(), example.supervised)
        logger.info("first row of %s (predicted tokens in brackets): %s", first.split, tokens)


def check_head(job: Job) -> None:
    """Compare the logits of one short row with those of the model's plain path.

    Raises:
        ModelError: they differ by more than the precision explains.
    """
    first = job.plan.shards[0]
    few = type(first)(first.name, first.split, first.start, min(first.start + 16, first.stop))
    examples = read_shard(job, few).examples
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


def check_rows(job: Job, shards: Sequence[ShardPlan]) -> None:
    """Read the rows that are to be made once, where the tokenizer has ids beyond the input embedding. One process does it for all.

    Raises:
        ModelError: a row has a token id without an input embedding, and the contract says stop.
    """
    if job.plan.contract.on_bad_row == "skip":
        return  # such rows are set aside, shard by shard
    if max(job.tokenizer.get_vocab().values(), default=0) < embedding_rows(job.teacher.model):
        return
    for shard in track(shards, "token ids", len(shards), unit="shard"):
        check_ids(job.teacher.model, read_shard(job, shard).examples, job.tokenizer, job.teacher.name)
