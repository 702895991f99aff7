"""The records of a generated data set, in the order in which data flows through them.

prompts -> Prompt -> Asked -> Completion -> shard -> Generation
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

#: The files of a generated data set; `samples` holds the shards with all completions, until those
#: to drop are known.
NAMES = Names(
    result="generated data set", work="generation", end="generation.json", plan="generation-plan.json", shards="samples"
)

#: Why a completion ends: with an end-of-sequence token, with a text of `--stop`, or at
#: `--max-new-tokens`.
FinishReason = Literal["eos", "stop", "length"]
#: Who made the token ids of a completion: the model that drew them, the server's response, or the
#: tokenizer, of the text.
IdsFrom = Literal["model", "server", "tokenizer"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One source row, ready for the model."""

    source_row: int
    text: str
    """As the model reads it: a chat is rendered."""
    input_ids: np.ndarray
    """(T,) int32."""
    label: str | None = None
    """With a template: what the example is asked for."""
    kept: Mapping[str, Scalar] = field(default_factory=dict)
    is_chat: bool = False
    """Rendered with the chat template: the completion is a turn of the assistant."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One completion that is to be written."""

    prompt: Prompt
    split: str
    sample: int

    @property
    def num_tokens(self) -> int:
        """T of the prompt."""
        return len(self.prompt.input_ids)


@dataclass(frozen=True, slots=True)
class Completion:
    """What was written."""

    text: str
    token_ids: np.ndarray
    """(T,) int32, with the end-of-sequence token where one ends it."""
    finish_reason: FinishReason
    logprob: float | None
    """Sum over the tokens, nats, under the model at temperature 1 without filters. None: the server
    does not say."""
    ids_from: IdsFrom = "model"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn."""

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
    """How rows become prompts."""

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
        """Whether the prompts are rendered with the chat template."""
        return self.kind == "chats" or self.as_chat


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model of a server, as far as it says."""

    name: str
    api: str
    """`vllm`, `sglang`, `llama.cpp`, `ollama`, or `openai` where it does not say."""
    version: str | None = None
    """Of the server's software, where it says so."""
    own_settings: tuple[str, ...] = ()
    """Settings of the draws that the server takes from nobody: it applies its own."""


@dataclass(frozen=True, slots=True)
class GenerationContract:
    """Everything that decides what a generated data set holds.

    Two runs of one contract may share a directory.
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
    """Name and type of each column of the shards."""


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """What a run sets out to make, fixed before its first shard."""

    contract: GenerationContract
    shards: tuple[ShardPlan, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """Completions of a finished data set.

    One with several faults counts in each, and is dropped once.
    """

    completions: int
    tokens: int
    ended: int
    """With an end-of-sequence token."""
    stopped: int
    """With a text of `--stop`."""
    empty: int
    cut: int
    repeated: int
    duplicate: int
    kept: int
    rows_set_aside: int
    """Source rows that were no prompts."""
    short_rows: int
    """Of a corpus: texts of fewer tokens than a prompt has."""


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """`generation.json`: written last."""

    format_version: int
    generation_id: str
    """SHA-256 over the contract and the shard table."""
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
        """Of its completions."""
        return self.end.counts
