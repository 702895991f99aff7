"""Shards, batches and stored columns of a capture.

They depend on the source and the settings only, so that every worker derives the same plan.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

import pyarrow as pa

from pipeline.cache.format.codec import COLUMNS
from pipeline.errors import MisuseError, SourceError
from pipeline.records import (
    Columns,
    Encoding,
    Full,
    Sampled,
    Score,
    ShardPlan,
    Tokenization,
    TopK,
)
from pipeline.sources import Source, most_choices
from pipeline.sources.files.joined import parts_of
from pipeline.tasks import Task, get_task

_TARGET_BYTES = 128 << 20
_MOST_ROWS = 10_000
_IMAGE_BYTES = 64 << 10
#: The largest number of files that the Hub accepts in one folder.
MOST_FILES = 10_000
#: The `full` encoding is refused for language models whose rows of logits exceed this.
MAX_ROW_BYTES = 64 << 20


Ranges = Mapping[str, tuple[int, int]]


def ranges_of(source: Source, rows: tuple[int, int | None] | None = None) -> Ranges:
    """Return the source rows `[start, stop)` of each split that a capture reads.

    A split that is shorter than `rows` contributes the rows that it has.

    Raises:
        SourceError: no split has such rows.
    """
    start, stop = rows or (0, None)
    found = {split: (min(start, len(data)), min(stop or len(data), len(data))) for split, data in source.splits.items()}
    found = {split: (first, last) for split, (first, last) in found.items() if first < last}
    if not found:
        longest = max(len(data) for data in source.splits.values())
        raise SourceError(
            f"{source.name}: --rows {start}:{stop or ''}: no split has such rows; the longest has {longest:,}"
        )
    return found


def plan_shards(
    ranges: Ranges,
    rows_per_shard: int,
    *,
    after: Sequence[ShardPlan] = (),
    row_groups: Mapping[str, Sequence[int]] | None = None,
) -> tuple[ShardPlan, ...]:
    """Cut the rows of every split into shards of `rows_per_shard` rows.

    A shard is shorter if it ends with a row group of the source, or with the split.

    Args:
        after: existing shards; numbering continues after them.
        row_groups: split -> the first row of each row group that is read as a whole, ascending.
    """
    taken = Counter(shard.split for shard in after)
    return tuple(
        ShardPlan(f"{split}-{number:05d}", split, first, last)
        for split, (start, stop) in ranges.items()
        for number, (first, last) in enumerate(
            itertools.pairwise(_cuts(start, stop, rows_per_shard, (row_groups or {}).get(split, ()))),
            start=taken[split],
        )
    )


def _cuts(start: int, stop: int, most: int, row_groups: Sequence[int]) -> list[int]:
    """Return the first row of each shard, and `stop`.

    A shard ends at the last start of a row group within `most` rows, if there is one.
    """
    cuts = [start]
    while cuts[-1] < stop:
        reach = min(cuts[-1] + most, stop)
        last = bisect.bisect_right(row_groups, reach) - 1
        whole = reach < stop and last >= 0 and row_groups[last] > cuts[-1]
        cuts.append(row_groups[last] if whole else reach)
    return cuts


def default_rows_per_shard(task: Task, encoding: Encoding, num_classes: int, tokenization: Tokenization) -> int:
    """Return a number of source rows whose shard has about 128 MB.

    It uses an upper estimate of the bytes per position and per image.
    """
    max_length = tokenization.max_length * (tokenization.num_choices or 1)
    if isinstance(encoding, Full):
        per_position = 4 * num_classes
    elif isinstance(encoding, Score):
        per_position = 4
    elif isinstance(encoding, Sampled):
        per_position = int(2 * encoding.sample_size)
    else:
        per_position = 4 * encoding.k if isinstance(encoding, TopK) else 256
    row_bytes = max_length * (4 + per_position) if task.marks_positions else 4 * max_length + per_position
    if task.reads == "images":
        row_bytes = (row_bytes + _IMAGE_BYTES) * (1 if tokenization.views is None else tokenization.views.count)
    return max(1, min(_MOST_ROWS, _TARGET_BYTES // row_bytes))


def kept_types(source: Source) -> dict[str, pa.DataType]:
    """Return the Arrow type of each kept column, as Parquet returns it.

    Raises:
        MisuseError: a column has the name of one of the cache's own columns.
        SourceError: a column has different types in two splits.
    """
    for name in source.columns.keep:
        if name in COLUMNS:
            raise MisuseError(
                f"--keep-column {name}: a column of this name means something else in a cache; rename the source's"
            )
    kept: dict[str, pa.DataType] = {}
    for split, rows in source.splits.items():
        for part, name in itertools.product(parts_of(rows), source.columns.keep):
            kind = part.features.arrow_schema.field(name).type
            if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
                kind = pa.string()
            if kept.setdefault(name, kind) != kind:
                raise SourceError(
                    f"{source.name}: split {split}: column {name}: expected {kept[name]}, as in the splits before, found {kind}"
                )
    return kept


def check_stored(
    task: Task,
    columns: Columns,
    tokenization: Tokenization,
    *,
    store_text: bool | None,
    store_label_logprobs: bool = False,
    fast_tokenizer: bool = True,
) -> None:
    """Refuse to store text or log-probabilities that the rows of this data set do not have.

    Args:
        store_text: None: the task's default.
        fast_tokenizer: whether the tokenizer gives the character offsets of tokens.

    Raises:
        MisuseError: the message names the flag.
    """
    if store_label_logprobs and task.label_source != "tokens":
        raise MisuseError(
            f"--store-label-logprobs is for language models, where every position has a hard label, the token that follows; --task {task.name} has classes; leave it out"
        )
    if store_text is not None and task.reads == "images":
        raise MisuseError(f"--store-text: rows of --task {task.name} hold images: see --store-images")
    if not store_text or task.stores_text:
        return
    if task.label_source == "target":
        raise MisuseError(f"--store-text: rows of --task {task.name} hold source and target as tokens; leave it out")
    if tokenization.packing:
        raise MisuseError(
            "--store-text does not go with --packing: a packed row is made of pieces of several texts; leave out one of the two"
        )
    if columns.input_ids is not None:
        raise MisuseError("--store-text: rows of token ids (--input-ids-column) have no text; leave it out")
    if not fast_tokenizer:
        raise MisuseError(
            "--store-text needs a fast tokenizer, which has the character offsets of tokens; leave it out"
        )


def choices_of(task: Task, source: Source) -> int | None:
    """Return the largest number of choices of a row; None if the task is not multiple choice."""
    return most_choices(source) if task.reads == "choices" else None


def judges_task(task: Task) -> Task:
    """Return the task of the language models that can label rows of `task` by prompt.

    Raises:
        MisuseError: language models cannot label rows of this task by prompt.
    """
    if task.judged_by is None:
        raise MisuseError(
            f"--prompt-template, --label-text and --shots are for class labels; --task {task.name} has none"
        )
    return get_task(task.judged_by)


def check_images_stored(task: Task, store_images: bool | None) -> bool:
    """Return whether the cache stores references to images instead of their bytes.

    Raises:
        MisuseError: the task has no images.
    """
    if store_images is not None and task.reads != "images":
        raise MisuseError(f"--store-images is for images; --task {task.name} reads texts; leave it out")
    return store_images is False


def text_columns(task: Task, store_text: bool | None, *, chats: bool) -> dict[str, bool]:
    """Return the arguments of `cache_schema` that select the text columns."""
    if task.other_tokenizers == "words":
        return {"words": store_text is not False}
    if task.stores_text:
        return {"text": store_text is not False, "choices": task.reads == "choices" and store_text is not False}
    return {"text": bool(store_text) and not chats, "messages": bool(store_text) and chats}


def check_encoding(task: Task, encoding: Encoding, num_classes: int, max_length: int) -> None:
    """Refuse an encoding that does not fit the task's targets, or that takes too much space.

    Raises:
        MisuseError: the message names an alternative.
    """
    if (task.target == "score") != isinstance(encoding, Score):
        raise MisuseError(
            f"--encoding {encoding.kind}: is for {'scores' if isinstance(encoding, Score) else 'distributions'}, which --task {task.name} does not have; leave it out"
        )
    if isinstance(encoding, Full) and full_row_is_too_large(task, num_classes, max_length):
        raise MisuseError(
            f"--encoding full: a row of {max_length} tokens over {num_classes} classes takes {2 * num_classes * max_length >> 20} MB, expected at most {MAX_ROW_BYTES >> 20}; "
            "use --encoding sampled (unbiased, some 25 bytes a position) or top-k, or a smaller --max-length"
        )


def full_row_is_too_large(task: Task, num_classes: int, max_length: int) -> bool:
    """Return whether a row of float16 logits is over 64 MB, so that `full` is refused."""
    return task.marks_positions and 2 * num_classes * max_length > MAX_ROW_BYTES


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[tuple[list[int], int]]:
    """Group rows of similar length; return (row indices, padded length) of each forward pass.

    Batches of long rows come first, so that an out-of-memory error occurs at the start. A padded
    batch has at most `batch_tokens` tokens, or a single row.
    """
    batches: list[tuple[list[int], int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1][0]) + 1) * batches[-1][1] <= batch_tokens:
            batches[-1][0].append(row)
        else:
            batches.append(([row], lengths[row]))
    return batches


def library_versions() -> dict[str, str]:
    """Return the versions of the packages that must be equal for byte-identical shards."""
    found = {}
    for name in ("soft-label-pipeline", "torch", "transformers", "tokenizers", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
