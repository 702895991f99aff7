"""Reading and tokenization of the rows of one shard, before the teacher runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.capture.job import Job
from pipeline.errors import BadRowError, MisuseError
from pipeline.records import NO_LABEL, BadRow, Example, ShardPlan, TokenizedExample
from pipeline.sources import read_examples
from pipeline.tasks import ids_beyond, named_ids


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokenized rows of a shard."""

    shard: ShardPlan
    examples: list[TokenizedExample]
    bad: list[BadRow]
    unlabelled: int
    """Number of source rows without a label, if labels are read."""
    blank: int
    """Number of source rows with a text of only white space."""


def read_shard(job: Job, shard: ShardPlan) -> Tokens:
    """Read and tokenize the rows of a shard, in order; collect the rows that cannot be used.

    Raises:
        BadRowError: a row cannot be used, and the contract's `on_bad_row` is "stop".
        MisuseError: the cache stores references to images, and an image is not a file of the data
            set.
    """
    examples: list[TokenizedExample] = []
    bad: list[BadRow] = []
    counts: Counter[str] = Counter()
    found = _counting(read_examples(job.source, shard.split, shard.start, shard.stop, job.labels), counts)
    limit = job.teacher.embedding_rows
    refers = "image_sha256" in job.plan.contract.columns
    texts = bool(job.plan.contract.columns.keys() & {"text", "messages"})
    for item in job.task.tokenize(found, shard.split, job.tokenizer, job.plan.contract.tokenization, texts=texts):
        if refers and isinstance(item, TokenizedExample) and item.image is not None and item.image.file is None:
            raise MisuseError(
                f"--no-store-images: {job.source.name}: split {shard.split}, row {item.source_row}: {item.image.path or 'the image'} is not a file in the data set's directory, "
                "which a cache could refer to; leave the flag out"
            )
        if job.plan.contract.on_bad_row == "skip" and isinstance(item, TokenizedExample):
            item = _fed(item, shard.split, limit, job.tokenizer)
        if isinstance(item, BadRow):
            bad.append(item)
            stop_unless_skipped(job, bad)
        else:
            examples.append(item)
    labelled = (job.labels is not None or job.source.columns.choices) and job.source.columns.label is not None
    return Tokens(shard, examples, bad, counts["unlabelled"] if labelled else 0, counts["blank"])


def _counting(items: Iterator[Example | BadRow], counts: Counter[str]) -> Iterator[Example | BadRow]:
    """Yield the items unchanged; count rows without a label and rows with a blank text."""
    for item in items:
        if isinstance(item, Example):
            completion = item.prompt_completion[1:] if item.prompt_completion else ()
            counts["unlabelled"] += (
                item.label is None
                and not any(i != NO_LABEL for i in item.word_labels or item.flags or ())
                and all(math.isnan(score) for score in item.scores or ())
                and item.answers is None
            )
            counts["blank"] += any(
                text is not None and text.isspace() for text in (item.text, item.text_pair, *completion)
            )
        yield item


def _fed(row: TokenizedExample, split: str, limit: int, tokenizer: Any) -> TokenizedExample | BadRow:
    """Return the row, or a `BadRow` if the teacher has no embedding for one of its token ids."""
    beyond = ids_beyond([row], limit)
    if not beyond:
        return row
    reason = f"token ids without a row in the input embedding, which has {limit}: {named_ids(beyond, tokenizer)}"
    return BadRow(split, row.source_row, reason)


def losses(examples: Sequence[TokenizedExample]) -> dict[str, int]:
    """Return the fields of a receipt that count truncated rows and split chats."""
    cuts = [cut for example in examples for cut in example.cut]
    chats = [count for example in examples for count in example.split_chats]
    return {
        "cut_rows": len({cut.source_row for cut in cuts}),
        "cut_tokens": sum(cut.tokens for cut in cuts),
        "cut_supervised_rows": len({cut.source_row for cut in cuts if cut.supervised}),
        "split_chats": len(chats),
        "split_chat_rows": sum(chats),
    }


def stop_unless_skipped(job: Job, bad: Sequence[BadRow]) -> None:
    """Raise an error for the last bad row, unless the contract skips bad rows.

    Raises:
        BadRowError: the contract's `on_bad_row` is "stop".
    """
    if job.plan.contract.on_bad_row == "stop":
        row = bad[-1]
        raise BadRowError(
            f"{job.source.name}: split {row.split}, row {row.source_row}: {row.reason}; correct the row, or set such rows aside with --on-bad-row skip"
        )
