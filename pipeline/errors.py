"""The exception tree.

PipelineError               exit code 1; one line: what, where, expected, found, what to do next
|-- MisuseError             exit code 2: options that contradict each other
|-- ConfigError             a configuration file or value that cannot be used
|-- SourceError             a data set that is missing, empty, or has other columns or labels than named
|-- ModelError              a model, adapter or tokenizer that cannot be loaded or does not fit
|-- ServerError             an inference server that cannot be reached, refuses, or answers what cannot be used
|-- EncodingError           logits, temperatures or divergences that an encoding cannot serve
|-- BadRowError             a row whose text or logits cannot be cached
|-- CacheError              a directory that is not a cache, or cannot be written
|   |-- ContractError       two things that must agree differ: a resumed capture, a student and its cache
|   `-- IntegrityError      bytes that are not what the manifest says
`-- TrainingError           a training run that cannot start or go on
"""


class PipelineError(Exception):
    """Base of every error that a user can mend; its text is one line."""

    exit_code = 1


class MisuseError(PipelineError):
    """Options that contradict each other."""

    exit_code = 2


class ConfigError(PipelineError):
    """A configuration file or value that cannot be used."""


class SourceError(PipelineError):
    """A data set that is missing, empty, or has other columns or labels than named."""


class ModelError(PipelineError):
    """A model, adapter or tokenizer that cannot be loaded or does not fit."""


class ServerError(PipelineError):
    """An inference server that cannot be reached, refuses, or answers what cannot be used."""


class EncodingError(PipelineError):
    """Logits, temperatures or divergences that an encoding cannot serve."""


class BadRowError(PipelineError):
    """A row whose text or logits cannot be cached."""


class CacheError(PipelineError):
    """A directory that is not a cache, or cannot be written."""


class ContractError(CacheError):
    """Two things that must agree differ: a resumed capture, a student and its cache."""


class IntegrityError(CacheError):
    """Bytes that are not what the manifest says."""


class TrainingError(PipelineError):
    """A training run that cannot start or go on."""
