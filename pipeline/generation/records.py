"""The records of a generated data set, in the order of the data flow.

Prompt -> Asked -> Completion -> shard -> Generation
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.cache.format.manifest import Names
from pipeline.config.generation import Fault
from pipeline.records import ModelInfo, Scalar, Shard, ShardPlan, SourceInfo, TokenizerInfo

#: The files of a generated data set. `samples` holds the shards with all completions until the end
#: of the run, when some are dropped.
NAMES = Names(
    result="generated data set", work="generation", end="generation.json", plan="generation-plan.json", shards="samples"
)

#: Why a completion ends: an end-of-sequence token, a text of `--stop`, or `--max-new-tokens`.
FinishReason = Literal["eos", "stop", "length"]
#: Source of the token ids of a completion: the model that drew them, the server's response, or the
#: tokenizer, which encodes the response's text.
IdsFrom = Literal["model", "server", "tokenizer"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of one source row."""

    source_row: int
    text: str
    """The text that the model reads; chats are rendered."""
    input_ids: np.ndarray
    """(T,) int32."""
    label: str | None = None
    """With a template: the label of the requested example."""
    kept: Mapping[str, Scalar] = field(default_factory=dict)
    is_chat: bool = False
    """Whether the chat template rendered it, so that the completion is a turn of the assistant."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for one completion."""

    prompt: Prompt
    split: str
    sample: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.prompt.input_ids)


@dataclass(frozen=True, slots=True)
class Completion:
    """A generated completion."""

    text: str
    token_ids: np.ndarray
    """(T,) int32, including the end-of-sequence token if one ends it."""
    finish_reason: FinishReason
    logprob: float | None
    """Sum over the tokens under the model at temperature 1 without filters, nats. None: the server
    does not report it."""
    ids_from: IdsFrom = "model"


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling settings."""

    num_samples: int
    max_new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    min_p: float | None
    stop: tuple[str, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """The settings that turn rows into prompts."""

    kind: Literal["texts", "chats", "prefixes", "template"]
    as_chat: bool = False
    chat_template_kwargs: tuple[str, ...] = ()
    prefix_tokens: int | None = None
    template: str | None = None
    """The text of the template."""
    labels: tuple[str, ...] = ()
    num_examples: int | None = None
    shots: int = 0

    @property
    def are_chats(self) -> bool:
        """Whether the chat template renders the prompts."""
        return self.kind == "chats" or self.as_chat


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model of a server, as far as the server reports it."""

    name: str
    api: str
    """`vllm`, `sglang`, `llama.cpp`, `ollama`, or `openai` if the server does not report it."""
    version: str | None = None
    """Version of the server's software, if reported."""
    own_settings: tuple[str, ...] = ()
    """Sampling settings that the server does not accept; it uses its own values."""


@dataclass(frozen=True, slots=True)
class GenerationContract:
    """Everything that determines the content of a generated data set.

    Two runs with equal contracts may share a directory.
    """

    model: ModelInfo | ServedModel
    tokenizer: TokenizerInfo
    source: SourceInfo | None
    prompts: PromptSettings
    sampling: Sampling
    end_ids: tuple[int, ...]
    """The tokens that end a completion."""
    dropped: tuple[Fault, ...]
    batch_tokens: int
    on_bad_row: Literal["stop", "skip"]
    versions: Mapping[str, str]
    columns: Mapping[str, str]
    """Column name -> type, of the shards."""


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """The plan of a run, fixed before its first shard."""

    contract: GenerationContract
    shards: tuple[ShardPlan, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of the completions of a finished data set.

    A completion with several faults counts in each of them, and is dropped once.
    """

    completions: int
    tokens: int
    ended: int
    """Completions that end with an end-of-sequence token."""
    stopped: int
    """Completions that end with a text of `--stop`."""
    empty: int
    cut: int
    repeated: int
    duplicate: int
    kept: int
    rows_set_aside: int
    """Source rows that could not be prompts."""
    short_rows: int
    """Texts of a corpus with fewer tokens than a prompt."""


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """The content of `generation.json`, which is written last."""

    format_version: int
    generation_id: str
    """SHA-256 of the contract and the shard table."""
    contract: GenerationContract
    shards: tuple[Shard, ...]
    counts: Counts


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generated data set."""

    root: Path
    end: GenerationEnd

    @property
    def counts(self) -> Counts:
        """The counts of its completions."""
        return self.end.counts
