"""Checks of the teacher and of the rows before the first shard."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from pipeline.cache.views.tokens import marked_tokens
from pipeline.cache.writing.build import note_answer
from pipeline.capture.job import Job
from pipeline.capture.reading import read_shard
from pipeline.capture.teachers.protocol import Keep
from pipeline.progress import track
from pipeline.records import ShardPlan, TokenizedExample
from pipeline.sources import holds_chats
from pipeline.tasks import check_ids
from pipeline.tasks.chats import supervision

logger = logging.getLogger(__name__)


def show_first_row(job: Job) -> None:
    """Log the first row as tokens, with the predicted or labelled tokens in brackets.

    This shows a wrong template or mask at the start.
    """
    first = job.plan.shards[0]
    few = type(first)(first.name, first.split, first.start, min(first.start + 1, first.stop))
    examples = read_shard(job, few).examples
    if job.task.reads == "images":
        _show_first_image(job, examples)
        return
    if holds_chats(job.source):
        logger.info("chats: %s", supervision(job.plan.contract.tokenization, job.tokenizer))
    for example in examples[:1]:
        follows = example.labels is None
        tokens = marked_tokens(job.tokenizer, example.input_ids.tolist(), example.supervised, follows=follows)
        marked = " (predicted tokens in brackets)" if follows else " (labelled tokens in brackets)"
        marked = "" if example.supervised is None else marked
        logger.info("first row of %s%s: %s", first.split, marked, tokens)


def _show_first_image(job: Job, examples: Sequence[TokenizedExample]) -> None:
    for example in examples[:1]:
        inputs, _ = job.task.collate([example], 0, processor=job.tokenizer)
        pixels = inputs["pixel_values"]
        assert example.image is not None
        logger.info(
            "first row of %s: %s, %d bytes, as %d channels of %d x %d pixels, mean %.2f, standard deviation %.2f",
            *(job.plan.shards[0].split, example.image.path or "an image", len(example.image.data)),
            *(*pixels.shape[1:], pixels.mean(), pixels.std()),
        )


def check_head(job: Job, keep: Keep | None = None) -> None:
    """Let the teacher check its predictions on one short row of the first shard.

    Args:
        keep: receives the first answer of the teacher. Default: store it next to the plan.

    Raises:
        PipelineError: the check fails.
    """
    first = job.plan.shards[0]
    few = type(first)(first.name, first.split, first.start, min(first.start + 16, first.stop))
    examples = read_shard(job, few).examples
    job.teacher.compare(examples, job.plan.contract.encoding, keep or partial(note_answer, job.layout))


def check_rows(job: Job, shards: Sequence[ShardPlan]) -> None:
    """Check all rows of the shards for token ids without an input embedding.

    The rows are read only if the tokenizer has ids beyond the embedding. One process checks the
    rows for all workers.

    Raises:
        ModelError: a row has such a token id, and the contract's `on_bad_row` is "stop".
    """
    if job.task.reads == "images":
        return
    if job.plan.contract.on_bad_row == "skip":
        return  # such rows are skipped during the capture of their shard
    if max(job.tokenizer.get_vocab().values(), default=0) < job.teacher.embedding_rows:
        return
    for shard in track(shards, "token ids", len(shards), unit="shard"):
        check_ids(job.teacher.embedding_rows, read_shard(job, shard).examples, job.tokenizer, job.teacher.name)
