"""Check that the soft labels of a cache match its tokens and labels.

The check runs when a cache is made and before it is trained from, and uses the cache alone.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.cache.format.codec import unpack, unpack_soft
from pipeline.cache.format.contents import check_contents
from pipeline.cache.format.manifest import Layout
from pipeline.cache.reading.probe import probe_alignment
from pipeline.cache.reading.reader import Cache
from pipeline.cache.reading.shards import open_shard, read_row_group
from pipeline.errors import ContractError
from pipeline.metrics.scores import pearson
from pipeline.records import NO_LABEL, AlignmentProbe, RowBlock, Score, Shard, is_known
from pipeline.softlabels import most_likely
from pipeline.softlabels.fidelity import spread
from pipeline.tasks import get_task

logger = logging.getLogger(__name__)

#: Limits of what is checked, spread over the shards: enough for the probe, at most a second's work.
_POSITIONS, _ROWS, _ROW_GROUPS, _FEW_ROW_GROUPS = 20_000, 4_000, 16, 256
#: Labelled rows needed to judge agreement, and standard errors by which it must exceed chance.
_ENOUGH_ROWS, _STANDARD_ERRORS = 30, 3.0


def check_alignment(
    cache: Cache, splits: Sequence[str] | None = None, *, name: str | None = None
) -> AlignmentProbe | None:
    """Probe rows from all over a cache; log a warning if the result is inconclusive.

    For a cache behind a URL the probe in its manifest is used, since reading rows from all over the
    cache would fetch them.

    Args:
        splits: the splits to check. Default: all.
        name: name of the cache in messages. Default: its location.

    Returns:
        The result of the probe, or None if the classes are not tokens. In that case the teacher's
        most likely class is compared with the hard label instead, and a warning is logged if they
        agree no more often than by chance.

    Raises:
        ContractError: the soft labels are not aligned with their tokens.
        IntegrityError: a row group that is read is damaged.
    """
    name = name or cache.where
    if cache.remote is not None:
        probe = cache.manifest.probe
    else:
        blocks = list(spread_blocks(cache, splits or cache.splits))
        probe = probe_alignment(blocks)
        if probe is None:
            task = get_task(cache.manifest.contract.task)
            of_words = task.label_source == "positions" and task.marks_positions
            _warn_of_chance(name, blocks, "words" if of_words else "positions")
    if probe is None:
        return None
    if probe.verdict == "inconclusive":
        logger.warning(
            "%s: %d positions do not show whether the soft labels are aligned with their tokens",
            name,
            probe.positions,
        )
    if probe.verdict == "misaligned":
        raise ContractError(
            f"{name}: the soft labels are not aligned with their tokens: mean weight of the hard label at shift -1, 0, +1 is {probe.previous:.4f}, "
            f"{probe.aligned:.4f}, {probe.following:.4f}, expected the middle one to be largest; shift the logits by one"
        )
    return probe


def spread_blocks(cache: Cache, splits: Sequence[str]) -> Iterator[RowBlock]:
    """Yield the first rows of evenly spaced row groups; all rows of a small cache."""
    shards = [shard for split in splits for shard in cache.manifest.split_shards(split)]
    groups = [(shard, i) for shard in shards for i in range(len(shard.row_groups))]
    few = sum(shard.positions for shard in shards) <= _POSITIONS and sum(shard.rows for shard in shards) <= _ROWS
    chosen = groups if few and len(groups) <= _FEW_ROW_GROUPS else [groups[i] for i in spread(len(groups), _ROW_GROUPS)]
    contract = cache.manifest.contract
    for shard, group in chosen:
        path = Layout(cache.root).shard(shard.name)
        table = read_row_group(open_shard(path), path, group)
        check_contents(table, contract, f"{path}: row group {group}")
        rows = table.num_rows if few else _quota(shard, len(chosen))
        yield unpack(table.slice(0, rows), contract.encoding, contract.num_classes)


def _quota(shard: Shard, groups: int) -> int:
    """Return the number of rows to read of each of `groups` row groups."""
    per_row = shard.positions / shard.rows
    return max(1, min(math.ceil(_POSITIONS / groups / per_row), _ROWS // groups))


def _labels(block: RowBlock) -> np.ndarray | None:
    """Return the (N,) hard labels, -100 if unknown; None: the labels are tokens."""
    return block.lists["position_labels"].values if "position_labels" in block.lists else block.numbers.get("label")


def _warn_of_chance(name: str, blocks: Sequence[RowBlock], unit: str) -> None:
    """Warn if the teacher's most likely class matches the hard label no more often than by chance.

    Chance is the rate at which two independent choices with the same class frequencies match. For
    scores, the correlation with the data's scores is tested instead.

    Args:
        unit: what has a label, if rows have several.
    """
    if any(isinstance(block.encoding, Score) for block in blocks):
        _warn_of_no_correlation(name, blocks)
        return
    pairs = [
        (label, best)
        for block in blocks
        if (known := _labels(block)) is not None
        for label, best in zip(known.tolist(), most_likely(unpack_soft(block))[0].tolist(), strict=True)
        if label != NO_LABEL
    ]
    count = len(pairs)
    if count < _ENOUGH_ROWS:
        return
    labels, predicted = Counter(label for label, _ in pairs), Counter(best for _, best in pairs)
    chance = sum(labels[i] * predicted[i] for i in labels) / count**2
    agreement = sum(label == best for label, best in pairs) / count
    if chance < 1 and (agreement - chance) * math.sqrt(count) <= _STANDARD_ERRORS * math.sqrt(chance * (1 - chance)):
        logger.warning(
            "%s: the teacher's most likely class is the hard label in %.1f%% of %d %s, no more than by chance (%.1f%%): is it trained, and are its labels in the data's order?",
            name,
            100 * agreement,
            count,
            unit if any("position_labels" in block.lists for block in blocks) else "rows",
            100 * chance,
        )


def _warn_of_no_correlation(name: str, blocks: Sequence[RowBlock]) -> None:
    for output in range(max(int(block.lists["teacher_scores"].counts.max(initial=0)) for block in blocks)):
        teacher, data = (
            np.concatenate([block.lists[column].values.reshape(len(block), -1)[:, output] for block in blocks])
            for column in ("teacher_scores", "position_labels")
        )
        known = is_known(data)
        r, count = pearson(teacher[known], data[known]), int(known.sum())
        if count >= _ENOUGH_ROWS and not r > _STANDARD_ERRORS / math.sqrt(count):
            logger.warning(
                "%s: output %d: the correlation of the teacher's scores with the data's is %s over %d rows, no more than by chance: is it trained, and do large scores mean the same in both?",
                *(name, output, "not known" if math.isnan(r) else f"{r:.3f}", count),
            )
