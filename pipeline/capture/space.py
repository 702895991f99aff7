"""Estimate of the size of a cache, and a warning if the disk is too small.

The check runs before the first shard; a capture may take days.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence

from pipeline.cache.format.manifest import load_receipt
from pipeline.capture.job import Job
from pipeline.records import (
    Encoding,
    Full,
    Sampled,
    Score,
    ShardPlan,
    TokenizedExample,
    TopK,
)
from pipeline.softlabels.fidelity import spread
from pipeline.sources import read_examples

logger = logging.getLogger(__name__)

#: Maximum number of source rows that are tokenized for the estimate.
_SAMPLE = 64
#: Bytes of a row without its lists, and bytes of a token.
_ROW_BYTES, _TOKEN_BYTES = 40, 2


def warn_of_full_disk(job: Job, waiting: Sequence[ShardPlan], *, overwrite: bool = False) -> int:
    """Warn if the outstanding shards will probably not fit on the disk.

    Args:
        overwrite: existing shards will be deleted and are not used for the estimate.

    Returns:
        The estimated size of the outstanding shards in bytes: from the bytes per source row of
            existing shards, or else from the tokens of a few rows.
    """
    needed = int(_bytes_per_row(job, overwrite=overwrite) * sum(shard.stop - shard.start for shard in waiting))
    if job.layout.outbox is not None:  # only one shard at a time is on this disk
        return needed
    root = job.layout.root.absolute()
    free = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free
    if needed > free:
        logger.warning(
            "%s: about %.1f GB are to be written, and %.1f GB are free on this disk; free some, or use another --output "
            "(a full disk stops the capture; what is finished stays, and the same command continues)",
            job.layout.root,
            needed / 1e9,
            free / 1e9,
        )
    return needed


def _bytes_per_row(job: Job, *, overwrite: bool) -> float:
    receipts = [] if overwrite else [load_receipt(job.layout, shard.name) for shard in job.plan.shards]
    done = [receipt for receipt in receipts if receipt is not None]
    if done:
        rows = sum(receipt.plan.stop - receipt.plan.start for receipt in done)
        return sum(receipt.shard.bytes for receipt in done) / max(rows, 1)
    contract = job.plan.contract
    per_position = bytes_per_position(contract.encoding, contract.num_classes)
    per_position += 2 * sum(name in contract.columns for name in ("entropy", "label_logprobs"))
    total = 0.0
    examples, rows = sample_rows(job)
    for item in examples:
        text = sum(len(each or "") for each in (item.text, item.text_pair, item.messages))
        stored = item.image is not None and "image_sha256" not in contract.columns
        text += 0 if item.image is None or not stored else len(item.image.data)
        total += _ROW_BYTES + _TOKEN_BYTES * item.num_tokens + per_position * item.num_positions + text
    return total / max(rows, 1)


def sample_rows(job: Job) -> tuple[list[TokenizedExample], int]:
    """Tokenize a few rows of the source; return the examples and the number of source rows.

    With packing, each row is packed by itself.
    """
    examples: list[TokenizedExample] = []
    rows = 0
    for split, row in _sample(job):
        found = read_examples(job.source, split, row, row + 1, job.labels)
        texts = bool(job.plan.contract.columns.keys() & {"text", "messages"})
        made = job.task.tokenize(found, split, job.tokenizer, job.plan.contract.tokenization, texts=texts)
        examples += [item for item in made if isinstance(item, TokenizedExample)]
        rows += 1
    return examples, rows


def bytes_per_position(encoding: Encoding, num_classes: int) -> float:
    """Return the approximate size of a position in Parquet, in bytes.

    Measured on language models; see docs/encodings.md.
    """
    if isinstance(encoding, Full):
        return (4 if num_classes < 4096 else 2) * num_classes
    if isinstance(encoding, Score):
        return 4.0
    if isinstance(encoding, Sampled):
        return min(encoding.sample_size + 2.0, 3.0 * num_classes)
    kept = encoding.k if isinstance(encoding, TopK) else 64
    return 3.1 * min(kept, num_classes) + 2 * len(encoding.temperatures)


def _sample(job: Job) -> list[tuple[str, int]]:
    """Return (split, source row) of sample rows, evenly spaced over the shards.

    If the source is read by row group, all sample rows come from one row group, because reading one
    row costs as much as reading its row group.
    """
    shards = job.plan.shards
    first = shards[0]
    if first.split in job.source.row_groups:
        near = job.source.sample_ranges(first.split, first.start, first.stop, 1)[0]
        return [(first.split, near[offset]) for offset in spread(len(near), _SAMPLE)]
    chosen = [shards[i] for i in spread(len(shards), _SAMPLE)]
    each = max(1, _SAMPLE // max(len(chosen), 1))
    return [
        (shard.split, shard.start + offset) for shard in chosen for offset in spread(shard.stop - shard.start, each)
    ]
