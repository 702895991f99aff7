"""One shard: source rows -> tokens -> teacher -> soft labels -> Parquet -> receipt."""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.cache.build import record
from pipeline.cache.codec import content_hash
from pipeline.cache.crash import reached
from pipeline.cache.manifest import Layout, Plan
from pipeline.cache.writer import write_shard
from pipeline.capture.plan import plan_batches
from pipeline.errors import BadRowError
from pipeline.models import LoadedModel, pad_id
from pipeline.records import BadRow, CachedExample, Encoding, Receipt, Shard, ShardPlan, TokenizedExample
from pipeline.softlabels import (
    counter_uniforms,
    encode,
    encode_and_score,
    narrow,
    rows,
    served_temperature,
    target,
)
from pipeline.softlabels.fidelity import FidelityMeter, Projection, Reference, spread
from pipeline.sources import LabelMap, Source, read_examples
from pipeline.tasks import Task

logger = logging.getLogger(__name__)

#: Positions whose fidelity is measured: in all, and of one batch.
_MEASURED, _MEASURED_OF_BATCH = 512, 64
_FEW_CLASSES = 4096


@dataclass(frozen=True, slots=True)
class Job:
    """All that `capture_shard` needs beside the number of the shard: fixed before the first, the same in every worker."""

    task: Task
    source: Source
    labels: LabelMap | None
    teacher: LoadedModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    schema: pa.Schema
    layout: Layout


def capture_shard(job: Job, shard: ShardPlan) -> Receipt:
    """Make one shard, knowing nothing of the others.

    Raises:
        BadRowError: a row cannot be cached, and the contract says stop.
        CacheError: the shard cannot be written.
    """
    started = time.monotonic()
    contract = job.plan.contract
    examples, bad = read_shard(job, shard)
    batches = plan_batches([example.num_tokens for example in examples], contract.batch_tokens)
    meter = FidelityMeter() if shard == job.plan.shards[0] else None
    cached: dict[int, CachedExample] = {}
    forward_seconds = 0.0
    measured = set(spread(len(batches), _MEASURED // _MEASURED_OF_BATCH))
    for number, (members, length) in enumerate(batches):
        part = [examples[i] for i in members]
        forward_started = time.monotonic()
        logits = forward(job, part, length)
        synchronize(logits)
        forward_seconds += time.monotonic() - forward_started
        broken = broken_rows(part, logits, shard.split)
        if broken:
            bad.extend(broken.values())
            _stop_unless_skipped(job, bad)
            logits = without(broken, part, logits)
            members = [row for i, row in enumerate(members) if i not in broken]
            part = [examples[i] for i in members]
        if meter is not None and members and number in measured:
            _measure(job, meter, part, logits, shard.split, seed=number)
        if members:
            made = label_rows(
                job.task,
                part,
                logits,
                contract.encoding,
                split=shard.split,
                seed=contract.seed,
                store_entropy="entropy" in contract.columns,
            )
            cached.update(zip(members, made, strict=True))
    in_order = [cached[i] for i in sorted(cached)]
    reached("shard:encoded")
    written = _write(job, shard, in_order)
    receipt = Receipt(
        shard=written,
        plan=shard,
        batches=tuple((len(members), length) for members, length in batches),
        device=device_name(job.teacher),
        seconds=round(time.monotonic() - started, 3),
        forward_seconds=round(forward_seconds, 3),
        bad_rows=tuple(sorted(bad, key=lambda row: row.source_row)),
        fidelity=None if meter is None else meter.result(),
    )
    record(job.layout, receipt)
    return receipt


def read_shard(job: Job, shard: ShardPlan) -> tuple[list[TokenizedExample], list[BadRow]]:
    """Tokens of a shard's rows, in order, and the rows that have none.

    Raises:
        BadRowError: a row cannot be used, and the contract says stop.
    """
    examples: list[TokenizedExample] = []
    bad: list[BadRow] = []
    found = read_examples(job.source, shard.split, shard.start, shard.stop, job.labels)
    for item in job.task.tokenize(found, shard.split, job.tokenizer, job.plan.contract.tokenization):
        if isinstance(item, BadRow):
            bad.append(item)
            _stop_unless_skipped(job, bad)
        else:
            examples.append(item)
    return examples, bad


def forward(job: Job, examples: Sequence[TokenizedExample], length: int | None = None) -> Tensor:
    """One pass of the job's teacher."""
    return teacher_logits(job.task, job.teacher, job.tokenizer, examples, job.plan.contract.num_classes, length)


def teacher_logits(
    task: Task,
    teacher: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TokenizedExample],
    num_classes: int,
    length: int | None = None,
) -> Tensor:
    """One pass of a teacher: (N, V) logits of the supervised positions, padded classes cut off.

    Args:
        length: to which rows are padded; default: the longest.
    """
    model = teacher.model
    inputs, supervised = task.collate(examples, pad_id(tokenizer), length)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if supervised is not None:
        supervised = supervised.to(model.device)
    with torch.inference_mode():
        logits = task.gather_logits(model, inputs, supervised)
    return logits[:, :num_classes]


def label_rows(
    task: Task,
    examples: Sequence[TokenizedExample],
    logits: Tensor,
    encoding: Encoding,
    *,
    split: str,
    seed: int,
    store_entropy: bool = False,
) -> list[CachedExample]:
    """(N, V) logits of several rows -> the rows with their soft labels, as they are stored."""
    labels = torch.from_numpy(np.concatenate([task.hard_labels(example) for example in examples])).to(logits.device)
    uniforms = torch.cat([_uniforms(example, split, seed) for example in examples])
    soft, scores = encode_and_score(logits, labels, encoding, uniforms)
    soft = narrow(soft, uniforms)
    nll, entropy = scores.nll.double(), scores.entropy.double()
    out, start = [], 0
    for example in examples:
        stop = start + example.num_positions
        sums = float(nll[start:stop].sum()), float(entropy[start:stop].sum())
        each = entropy[start:stop].float() if store_entropy else None
        out.append(CachedExample(example, rows(soft, start, stop), *sums, content_hash(example), each))
        start = stop
    return out


def _measure(
    job: Job, meter: FidelityMeter, examples: Sequence[TokenizedExample], logits: Tensor, split: str, *, seed: int
) -> None:
    """Add some positions of a batch to the measurement. It is a report: for want of memory it is left out, and the capture goes on."""
    matrix = output_matrix(job.teacher.model, job.plan.contract.num_classes)
    if matrix is None:
        return
    encoding = job.plan.contract.encoding
    chosen = torch.tensor(spread(len(logits), _MEASURED_OF_BATCH))
    uniforms = torch.cat([_uniforms(example, split, job.plan.contract.seed) for example in examples])[chosen]
    picked = logits[chosen.to(logits.device)]
    soft = narrow(encode(picked, encoding, uniforms=uniforms), uniforms)
    temperature = served_temperature(encoding)
    try:
        projection = Projection.of(matrix, picked.device)
        meter.add(Reference.of(picked, projection, temperature=temperature, seed=seed), target(soft, temperature), soft)
    except torch.OutOfMemoryError:
        logger.warning("fidelity is not measured: the output matrix in float32 does not fit beside the teacher")


def synchronize(logits: Tensor) -> None:
    """Wait until they are there: a GPU answers before it has done anything, and the clock would stop too early."""
    if logits.device.type == "cuda":
        torch.cuda.synchronize(logits.device)


def output_matrix(model: Any, num_classes: int) -> Tensor | None:
    """(V, H): what hidden states are multiplied with; the identity for few classes; None where there is no such matrix in memory."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is not None and weight.dim() == 2 and weight.is_floating_point() and not weight.is_meta:
        matrix: Tensor = weight.detach()[:num_classes]
        return matrix
    return torch.eye(num_classes, device=model.device) if num_classes <= _FEW_CLASSES else None


def device_name(teacher: LoadedModel) -> str:
    """The device model, as the receipt names it."""
    device = teacher.model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _uniforms(example: TokenizedExample, split: str, seed: int) -> Tensor:
    positions = np.zeros(1, dtype=np.int64) if example.supervised is None else np.flatnonzero(example.supervised)
    return counter_uniforms(seed, split, example.source_row, example.piece, positions)


def broken_rows(examples: Sequence[TokenizedExample], logits: Tensor, split: str) -> dict[int, BadRow]:
    """Rows with a position whose logits are no distribution."""
    peak = logits.amax(-1)
    good = torch.isfinite(peak).tolist()
    if all(good):
        return {}
    found, start = {}, 0
    for i, example in enumerate(examples):
        stop = start + example.num_positions
        if not all(good[start:stop]):
            value = float(peak[start:stop][~torch.isfinite(peak[start:stop])][0])
            found[i] = BadRow(split, example.source_row, f"expected finite logits, found {value}")
        start = stop
    return found


def without(broken: Container[int], examples: Sequence[TokenizedExample], logits: Tensor) -> Tensor:
    """The logits of the other rows."""
    keep = [i not in broken for i, example in enumerate(examples) for _ in range(example.num_positions)]
    return logits[torch.tensor(keep, device=logits.device)]


def _stop_unless_skipped(job: Job, bad: Sequence[BadRow]) -> None:
    if job.plan.contract.on_bad_row == "stop":
        row = bad[-1]
        raise BadRowError(
            f"{job.source.name}: split {row.split}, row {row.source_row}: {row.reason}; mend the row, or set such rows aside with --on-bad-row skip"
        )


def _write(job: Job, shard: ShardPlan, cached: Sequence[CachedExample]) -> Shard:
    if not cached:  # every row was set aside: a receipt, and no file
        return Shard(shard.name, shard.split, 0, 0, 0, 0, "", ())
    return write_shard(job.layout.shard(shard.name), shard, cached, job.schema)
