"""One shard: source rows -> tokens -> teacher -> soft labels -> Parquet -> receipt."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.cache.build import record
from pipeline.cache.codec import content_hash
from pipeline.cache.manifest import Layout, Plan
from pipeline.cache.writer import write_shard
from pipeline.capture.plan import plan_batches
from pipeline.errors import BadRowError
from pipeline.models import LoadedModel, pad_id
from pipeline.records import BadRow, CachedExample, Receipt, Shard, ShardPlan, TokenizedExample
from pipeline.softlabels import counter_uniforms, encode_and_score, narrow, rows
from pipeline.sources import LabelMap, Source, read_examples
from pipeline.tasks import Task


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
    examples, bad = read_shard(job, shard)
    batches = plan_batches([example.num_tokens for example in examples], job.plan.contract.batch_tokens)
    cached: dict[int, CachedExample] = {}
    forward_seconds = 0.0
    for members, length in batches:
        part = [examples[i] for i in members]
        forward_started = time.monotonic()
        logits = forward(job, part, length)
        forward_seconds += time.monotonic() - forward_started
        broken = _broken_rows(part, logits, shard.split)
        if broken:
            bad.extend(broken.values())
            _stop_unless_skipped(job, bad)
            logits = _without(broken, part, logits)
            members = [row for i, row in enumerate(members) if i not in broken]
            part = [examples[i] for i in members]
        if members:
            cached.update(zip(members, label_rows(job, part, logits, shard.split), strict=True))
    in_order = [cached[i] for i in sorted(cached)]
    written = _write(job, shard, in_order)
    receipt = Receipt(
        shard=written,
        plan=shard,
        batches=tuple((len(members), length) for members, length in batches),
        device=device_name(job.teacher),
        seconds=round(time.monotonic() - started, 3),
        forward_seconds=round(forward_seconds, 3),
        bad_rows=tuple(sorted(bad, key=lambda row: row.source_row)),
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
    """One pass of the teacher: (N, V) logits of the supervised positions, padded classes cut off."""
    model = job.teacher.model
    inputs, supervised = job.task.collate(examples, pad_id(job.tokenizer), length)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if supervised is not None:
        supervised = supervised.to(model.device)
    with torch.inference_mode():
        logits = job.task.gather_logits(model, inputs, supervised)
    return logits[:, : job.plan.contract.num_classes]


def label_rows(job: Job, examples: Sequence[TokenizedExample], logits: Tensor, split: str) -> list[CachedExample]:
    """(N, V) logits of several rows -> the rows with their soft labels."""
    encoding, seed = job.plan.contract.encoding, job.plan.contract.seed
    labels = torch.from_numpy(np.concatenate([job.task.hard_labels(example) for example in examples])).to(logits.device)
    uniforms = torch.cat([_uniforms(example, split, seed) for example in examples])
    soft, scores = encode_and_score(logits, labels, encoding, uniforms=uniforms)
    soft = narrow(soft, uniforms)
    nll, entropy = scores.nll.double(), scores.entropy.double()
    out, start = [], 0
    for example in examples:
        stop = start + example.num_positions
        sums = float(nll[start:stop].sum()), float(entropy[start:stop].sum())
        each = entropy[start:stop].float() if "entropy" in job.plan.contract.columns else None
        out.append(CachedExample(example, rows(soft, start, stop), *sums, content_hash(example), each))
        start = stop
    return out


def device_name(teacher: LoadedModel) -> str:
    """The device model, as the receipt names it."""
    device = teacher.model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _uniforms(example: TokenizedExample, split: str, seed: int) -> Tensor:
    positions = np.zeros(1, dtype=np.int64) if example.supervised is None else np.flatnonzero(example.supervised)
    return counter_uniforms(seed, split, example.source_row, example.piece, positions)


def _broken_rows(examples: Sequence[TokenizedExample], logits: Tensor, split: str) -> dict[int, BadRow]:
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


def _without(broken: Container[int], examples: Sequence[TokenizedExample], logits: Tensor) -> Tensor:
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
