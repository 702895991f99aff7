"""Capture of one shard: source rows -> tokens -> teacher -> soft labels -> Parquet -> receipt."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.format.codec import content_hash
from pipeline.cache.format.rows import in_order, make_block
from pipeline.cache.storage.crash import reached
from pipeline.cache.writing.build import record
from pipeline.cache.writing.writer import write_shard
from pipeline.capture.job import Job
from pipeline.capture.plan import plan_batches
from pipeline.capture.reading import Tokens, losses, read_shard, stop_unless_skipped
from pipeline.capture.teachers.predictions import Labelled, Predicted, faults, without
from pipeline.capture.teachers.protocol import Begun
from pipeline.errors import EncodingError, ModelError
from pipeline.records import (
    Encoding,
    Receipt,
    RowBlock,
    Sampled,
    Score,
    ShardPlan,
    SoftLabels,
    TeacherScores,
    TokenizedExample,
)
from pipeline.softlabels import (
    counter_uniforms,
    encode,
    encode_and_score,
    narrow,
    served_temperature,
    target,
)
from pipeline.softlabels.fidelity import FidelityMeter, Projection, Reference, spread
from pipeline.tasks import Task

logger = logging.getLogger(__name__)

#: Number of positions whose fidelity is measured: in total, and per batch.
_MEASURED, _MEASURED_OF_BATCH = 512, 64


#: Callback with (rows, tokens) after each batch. Rows are source rows of the shard, in proportion
#: to the tokenized rows of the batch; tokens exclude padding.
Moved = Callable[[int, int], None]


def capture_shards(
    job: Job, shards: Iterable[ShardPlan], done: Callable[[Receipt], None], moved: Moved = lambda rows, tokens: None
) -> None:
    """Capture shards one after another, independently of each other.

    While the teacher runs, the next shard is tokenized and the previous batch is encoded in other
    threads. On a GPU this takes no extra time; on a CPU these threads use the cores that a forward
    pass leaves idle. A teacher that is not `busy` (a server) gets several batches at once, also
    from the next shard.

    Args:
        done: called with each receipt after it is on disk, in another thread.
        moved: called after each batch, in the same thread as `done`.

    Raises:
        BadRowError: a row cannot be cached, and the contract's `on_bad_row` is "stop".
        CacheError: a shard cannot be written.
        ModelError: out of memory.
    """
    waiting = iter(shards)
    reader, encoder = ThreadPoolExecutor(1, "tokenise"), ThreadPoolExecutor(1, "encode")
    begun: deque[_Step] = deque()
    behind: Future[None] | None = None
    try:
        ahead = reader.submit(_read_next, job, waiting)
        while True:
            while begun and not ahead.done():
                behind = _take(job, begun.popleft(), encoder, done, behind)
            tokens = _tokens_of(ahead, behind)
            if tokens is None:
                break
            ahead = reader.submit(_read_next, job, waiting)
            batches = plan_batches([example.num_tokens for example in tokens.examples], job.plan.contract.batch_tokens)
            labels = _ShardLabels(job, tokens, batches, moved)
            for number, (members, length) in enumerate(batches):
                while begun and job.teacher.busy:
                    behind = _take(job, begun.popleft(), encoder, done, behind)
                with labels.teacher_runs(members, length):
                    begun.append(_Step(labels, number, forward(job, [tokens.examples[i] for i in members], length)))
            begun.append(_Step(labels))
        while begun:
            behind = _take(job, begun.popleft(), encoder, done, behind)
        if behind is not None:
            behind.result()
    finally:
        reader.shutdown(wait=False, cancel_futures=True)  # it may wait for a shard that never comes
        encoder.shutdown(cancel_futures=True)


def _tokens_of(ahead: Future[Tokens | None], written: Future[None] | None) -> Tokens | None:
    """Return the next shard's tokens, or None at the end.

    Errors from writing the previous shard are raised as soon as they are known.
    """
    if written is not None:
        futures: list[Future[Any]] = [ahead, written]
        wait(futures, return_when=FIRST_COMPLETED)
        if written.done():
            written.result()
    return ahead.result()


def _read_next(job: Job, waiting: Iterator[ShardPlan]) -> Tokens | None:
    shard = next(waiting, None)
    return None if shard is None else read_shard(job, shard)


@dataclass(frozen=True, slots=True)
class _Step:
    """A batch of a shard that the teacher has started, or the end of the shard."""

    labels: _ShardLabels
    number: int = 0
    begun: Begun | None = None
    """None: the end of the shard; all of its batches come before this step."""


def _take(
    job: Job, step: _Step, encoder: ThreadPoolExecutor, done: Callable[[Receipt], None], behind: Future[None] | None
) -> Future[None]:
    """Wait for a batch and submit its encoding, or the writing of its shard, to the encoder thread.

    The encoder is at most one batch (`behind`) late.
    """
    labels = step.labels
    if step.begun is None:
        if behind is not None:
            behind.result()
        return encoder.submit(labels.write, done)
    members, length = labels.batches[step.number]
    with labels.teacher_runs(members, length):
        predicted = step.begun.result()
    if behind is not None:
        behind.result()
    return encoder.submit(labels.add, step.number, members, predicted)


class _ShardLabels:
    """Accumulates the soft labels of one shard batch by batch; not thread-safe."""

    def __init__(self, job: Job, tokens: Tokens, batches: list[tuple[list[int], int]], moved: Moved) -> None:
        self.forward_seconds = 0.0
        self._started = time.monotonic()
        self._job, self._tokens, self.batches, self._moved = job, tokens, batches, moved
        self._seen = self._told = 0
        self._blocks: list[RowBlock] = []
        self._members: list[int] = []
        self._meter = FidelityMeter() if tokens.shard == job.plan.shards[0] else None
        self._measured = set(spread(len(batches), _MEASURED // _MEASURED_OF_BATCH))

    @contextmanager
    def teacher_runs(self, members: list[int], length: int) -> Iterator[None]:
        """Add the time spent waiting for the teacher to `forward_seconds`.

        Raises:
            ModelError: out of memory.
        """
        started = time.monotonic()
        try:
            yield
        except torch.OutOfMemoryError:
            batch_tokens = self._job.plan.contract.batch_tokens
            raise ModelError(
                f"out of memory in a batch of {len(members)} rows of {length} tokens; the batch size is part of the contract, so start again: "
                f"--batch-tokens {max(batch_tokens // 2, 1)} --overwrite"
            ) from None
        self.forward_seconds += time.monotonic() - started

    def add(self, number: int, members: list[int], logits: Predicted) -> None:
        """Encode one batch.

        Args:
            number: index of the batch in the shard.
            members: indices of the batch's rows in the shard.
            logits: the teacher's predictions for these rows.
        """
        split = self._tokens.shard.split
        part = [self._tokens.examples[i] for i in members]
        num_tokens = sum(example.num_tokens for example in part)
        self._seen += len(part)
        made: RowBlock | None
        try:
            made = self._label(part, logits)
        except EncodingError:  # found only now: this takes a pass over all logits
            broken = faults(logits, part, split)
            if not broken:
                raise
            self._tokens.bad.extend(broken.values())
            stop_unless_skipped(self._job, self._tokens.bad)
            logits = without(broken, part, logits)
            members = [row for i, row in enumerate(members) if i not in broken]
            part = [self._tokens.examples[i] for i in members]
            made = self._label(part, logits) if part else None
        if made is not None:
            self._blocks.append(made)
            self._members += members
        if self._meter is not None and part and number in self._measured:
            _measure(self._job, self._meter, part, logits, split, seed=number)
        shard = self._tokens.shard
        before, self._told = self._told, (shard.stop - shard.start) * self._seen // len(self._tokens.examples)
        self._moved(self._told - before, num_tokens)

    def _label(self, part: list[TokenizedExample], logits: Predicted) -> RowBlock:
        contract, schema = self._job.plan.contract, self._job.schema
        split = self._tokens.shard.split
        return label_rows(self._job.task, part, logits, contract.encoding, schema, split=split, seed=contract.seed)

    def write(self, done: Callable[[Receipt], None]) -> None:
        """Write the shard, then its receipt, which marks the shard as complete."""
        job, tokens = self._job, self._tokens
        reached("shard:encoded")
        block = in_order(self._blocks, self._members) if self._blocks else ()  # all skipped
        written = write_shard(job.layout.shard(tokens.shard.name), tokens.shard, block, job.schema)
        receipt = Receipt(
            shard=written,
            plan=tokens.shard,
            batches=tuple((len(members), length) for members, length in self.batches),
            device=job.teacher.device,
            seconds=round(time.monotonic() - self._started, 3),
            forward_seconds=round(self.forward_seconds, 3),
            bad_rows=tuple(sorted(tokens.bad, key=lambda row: row.source_row)),
            fidelity=None if self._meter is None else self._meter.result(),
            unlabelled_rows=tokens.unlabelled,
            blank_rows=tokens.blank,
            **losses(tokens.examples),
        )
        record(job.layout, receipt)
        done(receipt)


def forward(job: Job, examples: Sequence[TokenizedExample], length: int | None = None) -> Begun:
    """Start a batch on the job's teacher."""
    return job.teacher.begin(examples, length, job.plan.contract.encoding)


def label_rows(
    task: Task,
    examples: Sequence[TokenizedExample],
    logits: Predicted,
    encoding: Encoding,
    schema: pa.Schema,
    *,
    split: str,
    seed: int,
) -> RowBlock:
    """Encode the predictions of several rows as rows of a cache.

    Raises:
        EncodingError: the logits of some row cannot be encoded.
    """
    soft, scores = encode_rows(task, examples, logits, encoding, split=split, seed=seed)
    counts = [example.num_positions for example in examples]
    return make_block(
        examples,
        soft,
        row_sums(scores.nll, counts),
        row_sums(scores.entropy, counts),
        [content_hash(example) for example in examples],
        schema,
        counts=counts,
        entropy=scores.entropy.float(),
        label_logprobs=-scores.nll.float(),
    )


def encode_rows(
    task: Task,
    examples: Sequence[TokenizedExample],
    logits: Predicted,
    encoding: Encoding,
    *,
    split: str,
    seed: int,
    uniforms: Tensor | None = None,
) -> tuple[SoftLabels, TeacherScores]:
    """Encode the predictions of several rows; return their soft labels as stored, and the scores.

    Args:
        uniforms: (N,) float64 in [0, 1) for sampling. Default: derived from seed, split, source
            row, piece and position.

    Raises:
        EncodingError: the logits of some row cannot be encoded.
    """
    if isinstance(logits, Labelled):
        return logits.checked()
    labels = torch.from_numpy(task.hard_labels(examples)).to(logits.device)
    if uniforms is None:
        uniforms = _drawn(examples, encoding, split, seed)
    soft, scores = encode_and_score(logits, labels, encoding, uniforms)
    return narrow(soft, uniforms), scores


def row_sums(values: Tensor, counts: Sequence[int]) -> list[float]:
    """Sum consecutive runs of `counts` elements of the (N,) values, in float64."""
    if set(counts) == {1}:
        found: list[float] = values.double().tolist()
        return found
    return [float(part.sum()) for part in torch.split(values.double(), list(counts))]


def _measure(
    job: Job, meter: FidelityMeter, examples: Sequence[TokenizedExample], logits: Predicted, split: str, *, seed: int
) -> None:
    """Add some positions of a batch to the fidelity measurement.

    The measurement is only reported. If memory does not suffice, it is skipped with a warning.
    """
    matrix, encoding = job.teacher.output_matrix, job.plan.contract.encoding
    if matrix is None or isinstance(logits, Labelled) or isinstance(encoding, Score):
        return
    chosen = torch.tensor(spread(len(logits), _MEASURED_OF_BATCH))
    uniforms = _drawn(examples, encoding, split, job.plan.contract.seed)[chosen]
    picked = logits[chosen.to(logits.device)]
    soft = narrow(encode(picked, encoding, uniforms=uniforms), uniforms)
    temperature = served_temperature(encoding)
    try:
        projection = Projection.of(matrix, picked.device)
        meter.add(Reference.of(picked, projection, temperature=temperature, seed=seed), target(soft, temperature), soft)
    except torch.OutOfMemoryError:
        logger.warning("fidelity is not measured: the output matrix in float32 does not fit beside the teacher")


def _drawn(examples: Sequence[TokenizedExample], encoding: Encoding, split: str, seed: int) -> Tensor:
    """Return the (N,) float64 uniforms of all rows; zeros if the encoding does not sample."""
    if isinstance(encoding, Sampled):
        return torch.cat([_uniforms(example, split, seed) for example in examples])
    return torch.zeros(sum(example.num_positions for example in examples), dtype=torch.float64)


def _uniforms(example: TokenizedExample, split: str, seed: int) -> Tensor:
    supervised = example.supervised
    positions = np.arange(example.num_positions) if supervised is None else np.flatnonzero(supervised)
    return counter_uniforms(seed, split, example.source_row, example.piece, positions)
