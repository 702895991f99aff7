"""One shard: source rows -> tokens -> teacher -> soft labels -> Parquet -> receipt."""

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

#: Positions whose fidelity is measured: in all, and of one batch.
_MEASURED, _MEASURED_OF_BATCH = 512, 64


#: Called with rows and tokens after every batch: source rows of the shard in proportion to its
#: batches' rows, and tokens without padding.
Moved = Callable[[int, int], None]


def capture_shards(
    job: Job, shards: Iterable[ShardPlan], done: Callable[[Receipt], None], moved: Moved = lambda rows, tokens: None
) -> None:
    """Make shards one after another, knowing nothing of the others.

    While the teacher runs, the shard after is tokenised, and the batch before is encoded. On a GPU
    that costs no time; on a CPU it takes turns with the teacher, on the processors that a forward
    pass leaves idle. A teacher that is not busy has several batches at once, of the next shard too.

    Args:
        done: called with each receipt, once it is on disk; in another thread.
        moved: called after each batch, in the same thread as `done`.

    Raises:
        BadRowError: a row cannot be cached, and the contract says stop.
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
        reader.shutdown(wait=False, cancel_futures=True)  # it may wait for a shard that nobody will name
        encoder.shutdown(cancel_futures=True)


def _tokens_of(ahead: Future[Tokens | None], written: Future[None] | None) -> Tokens | None:
    """The next shard; errors from writing the previous one are raised as soon as they are known."""
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
    """A batch of a shard that the teacher has begun, or the end of the shard."""

    labels: _ShardLabels
    number: int = 0
    begun: Begun | None = None
    """None: all batches of the shard came before."""


def _take(
    job: Job, step: _Step, encoder: ThreadPoolExecutor, done: Callable[[Receipt], None], behind: Future[None] | None
) -> Future[None]:
    """Wait for a batch; encoding and writing are left to the encoder, which is at most one batch `behind`."""
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
    """The soft labels of one shard, as its batches come in; used by one thread."""

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
        """Count the time that is waited for the teacher."""
        started = time.monotonic()
        try:
            yield
        except torch.OutOfMemoryError:
            batch_tokens = self._job.plan.contract.batch_tokens
            raise ModelError(
                f"out of memory in a batch of {len(members)} rows of {length} tokens; the batches are part of what makes the bytes the same, so start anew: "
                f"--batch-tokens {max(batch_tokens // 2, 1)} --overwrite"
            ) from None
        self.forward_seconds += time.monotonic() - started

    def add(self, number: int, members: list[int], logits: Predicted) -> None:
        """Encode one batch: what the teacher predicts for the rows `members`."""
        split = self._tokens.shard.split
        part = [self._tokens.examples[i] for i in members]
        num_tokens = sum(example.num_tokens for example in part)
        self._seen += len(part)
        made: RowBlock | None
        try:
            made = self._label(part, logits)
        except EncodingError:  # looked for only now: it takes a pass over all logits
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
        """Write the shard, then its receipt: it counts from there on."""
        job, tokens = self._job, self._tokens
        reached("shard:encoded")
        block = in_order(self._blocks, self._members) if self._blocks else ()  # (): every row was set aside
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
    """Begin a batch of the job's teacher."""
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
    """Predictions of several rows -> the rows with their soft labels, as they are stored.

    Raises:
        EncodingError: logits of some row cannot be encoded.
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
    """Predictions of several rows -> their soft labels as they are stored, and the scores.

    Args:
        uniforms: (N,) float64 of the sample; default: by split, source row, piece and position.

    Raises:
        EncodingError: logits of some row cannot be encoded.
    """
    if isinstance(logits, Labelled):
        return logits.checked()
    labels = torch.from_numpy(task.hard_labels(examples)).to(logits.device)
    if uniforms is None:
        uniforms = _drawn(examples, encoding, split, seed)
    soft, scores = encode_and_score(logits, labels, encoding, uniforms)
    return narrow(soft, uniforms), scores


def row_sums(values: Tensor, counts: Sequence[int]) -> list[float]:
    """(N,) values -> the sums of runs of so many, in float64."""
    if set(counts) == {1}:
        found: list[float] = values.double().tolist()
        return found
    return [float(part.sum()) for part in torch.split(values.double(), list(counts))]


def _measure(
    job: Job, meter: FidelityMeter, examples: Sequence[TokenizedExample], logits: Predicted, split: str, *, seed: int
) -> None:
    """Add some positions of a batch to the measurement.

    It is a report: for want of memory it is left out, and the capture goes on.
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
    """(N,) float64 of the positions of all rows: 0 where the encoding draws nothing."""
    if isinstance(encoding, Sampled):
        return torch.cat([_uniforms(example, split, seed) for example in examples])
    return torch.zeros(sum(example.num_positions for example in examples), dtype=torch.float64)


def _uniforms(example: TokenizedExample, split: str, seed: int) -> Tensor:
    supervised = example.supervised
    positions = np.arange(example.num_positions) if supervised is None else np.flatnonzero(supervised)
    return counter_uniforms(seed, split, example.source_row, example.piece, positions)
