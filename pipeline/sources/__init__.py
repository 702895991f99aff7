"""Load a data set, map its columns, hold out a test split, and read its rows as examples."""

from pipeline.sources.content import Survey, fingerprints, is_of_files, survey
from pipeline.sources.inputs.choices import most_choices
from pipeline.sources.label_names import label_names
from pipeline.sources.labels import LabelMap
from pipeline.sources.prepare import from_datasets, load_source
from pipeline.sources.rows import read_examples
from pipeline.sources.scores import Labels, ScoreColumn, head_names, label_reader, list_starts
from pipeline.sources.source import Source, holds_chats
from pipeline.sources.unlabelled import load_unlabelled, with_unlabelled

__all__ = [
    "LabelMap",
    "Labels",
    "ScoreColumn",
    "Source",
    "Survey",
    "fingerprints",
    "from_datasets",
    "head_names",
    "holds_chats",
    "is_of_files",
    "label_names",
    "label_reader",
    "list_starts",
    "load_source",
    "load_unlabelled",
    "most_choices",
    "read_examples",
    "survey",
    "with_unlabelled",
]
