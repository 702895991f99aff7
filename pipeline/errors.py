"""The exception tree.

PipelineError               exit code 1; one line: what, where, expected, found, what to do next
|-- MisuseError             exit code 2: options that contradict each other
|-- ConfigError             a configuration file or value that cannot be used
|-- SourceError             a data set that is missing, empty, or lacks a named column or label
|-- ModelError              a model, adapter or tokenizer that does not load or does not fit
|-- ServerError             an inference server that is unreachable, refuses or answers wrongly
|-- EncodingError           logits, temperatures or divergences that an encoding does not support
|-- BadRowError             a row whose text or logits cannot be cached
|-- CacheError              a directory that is not a cache, or cannot be written
|   |-- ContractError       settings that must agree differ: a resumed capture, student and cache
|   `-- IntegrityError      bytes that differ from the manifest
`-- TrainingError           a training run that cannot start or continue
"""


class PipelineError(Exception):
    """Base class of all errors that a user can resolve; the message is one line."""

    exit_code = 1


class MisuseError(PipelineError):
    """Options that contradict each other."""

    exit_code = 2


class ConfigError(PipelineError):
    """A configuration file or value that cannot be used."""


class SourceError(PipelineError):
    """A data set that is missing, empty, or lacks a named column or label."""


class ModelError(PipelineError):
    """A model, adapter or tokenizer that does not load or does not fit."""


class ServerError(PipelineError):
    """An inference server that is unreachable, refuses requests, or sends unusable answers."""


class EncodingError(PipelineError):
    """Logits, temperatures or divergences that an encoding does not support."""


class BadRowError(PipelineError):
    """A row whose text or logits cannot be cached."""


class CacheError(PipelineError):
    """A directory that is not a cache, or cannot be written."""


class ContractError(CacheError):
    """Settings that must agree differ: of a resumed capture, or of a student and its cache."""


class IntegrityError(CacheError):
    """Bytes that differ from what the manifest states."""


class TrainingError(PipelineError):
    """A training run that cannot start or continue."""
