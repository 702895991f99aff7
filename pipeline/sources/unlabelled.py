"""Add rows without labels to the training split (`--unlabelled`)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from pipeline.config import DataConfig
from pipeline.errors import SourceError
from pipeline.records import UnlabelledSource
from pipeline.sources.columns import describe, holds_images, input_roles, side_roles
from pipeline.sources.files.joined import JoinedRows, parts_of
from pipeline.sources.prepare import load_source
from pipeline.sources.source import Source

logger = logging.getLogger(__name__)

#: The split that gets the rows.
_TRAIN = "train"


def load_unlabelled(names: Sequence[str], data: DataConfig) -> list[Source]:
    """Load the data sets that `--unlabelled` names, with the columns of the labelled one.

    Raises:
        SourceError: a data set is not found, or columns are missing or of another type.
    """
    alone = dataclasses.replace(
        data, data_files=(), dataset_config=None, dataset_revision=None, split=(), holdout=0.0, label_map=()
    )
    return [load_source(dataclasses.replace(alone, dataset=name), labelled=False) for name in names]


def with_unlabelled(source: Source, others: Sequence[Source]) -> Source:
    """Append the rows of other sources to `train`, in order and without their labels.

    If another source has several splits, its `train` is used.

    Raises:
        SourceError: a source lacks the split `train`, or a column has another type than in the
            labelled source.
    """
    if not others:
        return source
    if _TRAIN not in source.splits:
        raise SourceError(
            f"{source.name}: --unlabelled adds rows to the split train, found {', '.join(source.splits)}; leave out --split, or --unlabelled"
        )
    rows = source.splits[_TRAIN]
    parts, records = list(parts_of(rows)), []
    for other in others:
        if len(other.splits) > 1 and _TRAIN not in other.splits:
            raise SourceError(
                f"{other.name}: --unlabelled: expected a split train, or one split, found {', '.join(other.splits)}; give the file of one split"
            )
        added = other.splits.get(_TRAIN) or next(iter(other.splits.values()))
        names = input_roles(source.columns).values()
        group = () if source.columns.group is None else (source.columns.group,)
        for name in (*names, *side_roles(rows, source.columns).values(), *group, *source.columns.keep):
            expected, found = describe(rows.features[name]), describe(added.features.get(name))
            both_images = holds_images(rows.features[name]) and holds_images(added.features.get(name))
            if expected != found and not both_images:
                raise SourceError(
                    f"{other.name}: --unlabelled: column {name!r}: expected {expected}, as {source.name} has, found {found}; convert it"
                )
        if other.columns.label is not None:
            logger.info("%s: --unlabelled: its column %r is not read", other.name, other.columns.label)
        parts.extend(parts_of(added))
        records.append(UnlabelledSource(other.name, other.revision, len(added)))
    labelled = len(parts_of(rows))
    joined = JoinedRows(parts, label=source.columns.label, unlabelled=range(labelled, len(parts)))
    logger.info(
        "%s: split train: %d rows, and %d without labels of %s",
        *(source.name, len(rows), len(joined) - len(rows), ", ".join(record.name for record in records)),
    )
    return dataclasses.replace(source, splits={**source.splits, _TRAIN: joined}, unlabelled=tuple(records))
