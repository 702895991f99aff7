"""Compare the head on supervised positions with the model's plain path, before the first shard."""

from __future__ import annotations

import logging

import torch

from pipeline.cache.views.tokens import marked_tokens
from pipeline.capture.job import Job
from pipeline.capture.shard import forward, read_shard
from pipeline.errors import ModelError
from pipeline.tasks import check_ids, embedding_rows

logger = logging.getLogger(__name__)


def show_first_row(job: Job) -> None:
    """Log the first row as tokens, those that are predicted in brackets, so that a wrong template or mask is seen now."""
    first = job.plan.shards[0]
    few = type(first)(first.name, first.split, first.start, min(first.start + 1, first.stop))
    examples, _ = read_shard(job, few)
    for example in examples[:1]:
        tokens = marked_tokens(job.tokenizer, example.input_ids.tolist(), example.supervised)
        logger.info("first row of %s (predicted tokens in brackets): %s", first.split, tokens)


def check_head(job: Job) -> None:
    """Compare the logits of one short row with those of the model's plain path.

    Raises:
        ModelError: they differ by more than the precision explains, or a row has a token id without an input embedding.
    """
    _check_ids(job)
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


def _check_ids(job: Job) -> None:
    """Read all rows once where the tokenizer has ids beyond the input embedding."""
    if max(job.tokenizer.get_vocab().values(), default=0) < embedding_rows(job.teacher.model):
        return
    for shard in job.plan.shards:
        check_ids(job.teacher.model, read_shard(job, shard)[0], job.tokenizer, job.teacher.name)
