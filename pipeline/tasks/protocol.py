"""The `Task` protocol, and helpers that several tasks share.

A row of a task has N supervised positions. The target of a position is a distribution over V
classes, or a score.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.errors import MisuseError, ModelError
from pipeline.records import (
    NO_LABEL,
    BadRow,
    Columns,
    Encoding,
    Example,
    Inputs,
    LabelColumn,
    LabelNames,
    LabelSource,
    OtherTokenizers,
    Predictions,
    Ragged,
    TargetKind,
    TokenBlock,
    Tokenization,
    TokenizedExample,
)


class Task(Protocol):
    """The interface of a task. Implementations hold no state."""

    @property
    def name(self) -> str:
        """The value of `--task`."""

    @property
    def reads(self) -> Inputs:
        """The kind of input that the task's models read."""

    @property
    def auto_class(self) -> Any:
        """The `transformers.AutoModelFor...` that loads a model with this task's head."""

    @property
    def peft_type(self) -> str | None:
        """The task's name in PEFT; None: PEFT does not have the task, and adapters are refused."""

    @property
    def hub_category(self) -> str:
        """The task's name in the search of the Hugging Face Hub."""

    @property
    def usage(self) -> str:
        """Usage example for model cards: Markdown with fields `tag`, `folder` and `max_length`."""

    @property
    def marks_positions(self) -> bool:
        """Whether rows mark their positions; else a row has one position, or one per label name."""

    @property
    def label_source(self) -> LabelSource:
        """Where hard labels come from."""

    @property
    def names(self) -> LabelNames | None:
        """What the label names of contract and model refer to, such as the classes; None: no names.

        Training replaces a head that does not fit the label names of the data.
        """

    @property
    def target(self) -> TargetKind:
        """The kind of target that a position has."""

    @property
    def ranks(self) -> bool:
        """Whether scores rank the rows of a list; a column of the data set names the list."""

    @property
    def problem_type(self) -> str | None:
        """`config.problem_type` of the task's models; None: the task does not set it.

        It distinguishes tasks whose models have the same architecture.
        """

    @property
    def predicts_tokens(self) -> bool:
        """Whether class i is token i of the tokenizer."""

    @property
    def fuses_head(self) -> bool:
        """Whether the loss can be computed in chunks, without the full (N, V) logits."""

    @property
    def continues_prompts(self) -> bool:
        """Whether models generate text from a prompt: for data sets, serving and chats."""

    @property
    def takes_token_types(self) -> bool:
        """Whether `token_type_ids` are stored if the tokenizer returns them."""

    @property
    def stores_text(self) -> bool:
        """Whether texts are stored by default."""

    @property
    def other_tokenizers(self) -> OtherTokenizers | None:
        """How a student with another tokenizer learns from a cache; None: it cannot."""

    @property
    def judged_by(self) -> str | None:
        """The task whose models can label this task's rows by prompt; None: no model can."""

    @property
    def default_encoding(self) -> Encoding:
        """The default encoding of soft labels."""

    @property
    def default_temperature(self) -> float:
        """The training temperature if neither the user nor the encoding sets one."""

    @property
    def default_max_length(self) -> int:
        """Default length of the longest row in tokens, if the model accepts such rows."""

    @property
    def default_batch_tokens(self) -> int:
        """Tokens in a teacher's forward pass; keeps (N, V) logits at a few hundred megabytes."""

    @property
    def default_eval_rows(self) -> int:
        """Default number of rows in a forward pass of an evaluation."""

    @property
    def main_metric(self) -> str:
        """The metric that retention is computed from."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value of the main metric is better."""

    def check_columns(self, columns: Columns, tokenization: Tokenization) -> None:
        """Raise `MisuseError` if the task cannot use these columns or settings."""

    def settle(self, settings: Tokenization, tokenizer: PreTrainedTokenizerBase, *, chats: bool) -> Tokenization:
        """Return the settings that the contract records, completed with the task's defaults.

        For chats, they include what the chat template determines.

        Raises:
            PipelineError: the chat template cannot be used, or does not read one of the arguments.
        """

    def num_classes(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return V of a model's soft labels. Raises `ModelError` if the model has another head."""

    def tokenize(
        self,
        examples: Iterable[Example | BadRow],
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: Tokenization,
        *,
        texts: bool = False,
    ) -> Iterator[TokenizedExample | BadRow]:
        """Tokenize the examples of one shard into rows of the cache, in order.

        The rows have their supervised positions marked.

        Args:
            texts: language models: store the text or the messages of each row. This needs a fast
                tokenizer and rows that are not packed.
        """

    def default_positions(self, input_ids: np.ndarray) -> np.ndarray:
        """Return the default (T,) bool mask of supervised positions for (T,) token ids of a row."""

    def hard_labels(self, rows: TokenBlock | Sequence[TokenizedExample]) -> np.ndarray:
        """Return the (N,) hard labels of the supervised positions of all rows.

        They are int64, -100 where a label is missing; scores are float32, nan where missing.
        """

    def collate(
        self,
        rows: TokenBlock | Sequence[TokenizedExample],
        pad_id: int,
        length: int | None = None,
        *,
        processor: Any = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Collate rows into the arguments of `forward` and a mask of the supervised positions.

        Args:
            pad_id: token id of the padding.
            length: T; None: the length of the longest row.
            processor: the image processor if rows are images; it makes (B, C, H, W) pixel values.

        Returns:
            (B, T) tensors by argument name, and a (B, T) bool mask; None: one position per row.
        """

    def gather_logits(self, model: nn.Module, inputs: Mapping[str, Tensor], supervised: Tensor | None) -> Tensor:
        """Run one forward pass and return the (N, V) logits at the supervised positions."""

    def at_positions(self, logits: Tensor, supervised: Tensor | None) -> Tensor:
        """Select the (N, V) logits at the supervised positions from the logits of `forward`."""

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """Return the columns of the evaluation table; the main metric is one of them."""

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """Return (R,) sums and (R,) weights, which the bootstrap resamples.

        The ratio of their totals is the main metric.
        """


def check_columns(task: Task, columns: Columns, tokenization: Tokenization) -> None:
    """Raise `MisuseError` if the task cannot use these columns or settings.

    This includes a list column (`--group-column`) for a task that does not rank, and a missing one
    for a task that does.
    """
    if columns.image is not None and task.reads != "images":
        raise MisuseError(f"--image-column: --task {task.name} reads texts; give --task image-classification")
    if columns.choices and task.reads != "choices":
        raise MisuseError(
            f"--choices-column: --task {task.name} does not choose between texts; give --task multiple-choice"
        )
    task.check_columns(columns, tokenization)
    if columns.group is not None and not task.ranks:
        raise MisuseError(
            f"--group-column: names the lists that scores rank, and --task {task.name} ranks none; leave it out"
        )
    if columns.group is None and task.ranks:
        raise MisuseError(
            f"--task {task.name} needs --group-column: the column with the list of each row, such as its query; rows with the same value are a list"
        )
    if tokenization.views is not None and task.reads != "images":
        raise MisuseError(f"--views is for images; --task {task.name} reads texts; leave it out")
    if tokenization.stride is not None and task.names != "places":
        raise MisuseError(f"--stride is for question answering; --task {task.name} makes no windows; leave it out")
    if tokenization.masking is not None and task.label_source != "hidden":
        raise MisuseError(
            f"--mask-share, --whole-words, --mask-copies and --mask-seed are for masked language models; --task {task.name} hides nothing"
        )


def needs_label_column(task: Task) -> bool:
    """Whether hard labels are a column of the data set; else they are tokens of the text."""
    return task.label_source in ("row", "positions")


def may_lack_head(task: Task) -> bool:
    """Whether training adds a head to a model without one: for label names or masked tokens."""
    return task.names is not None or task.label_source == "hidden"


def label_column(task: Task) -> LabelColumn:
    """Return what the label column of a data set holds, if it has one."""
    if task.target == "score":
        return "scores"
    if task.names == "places":
        return "answers"
    return "classes" if task.names == "positions" else "class"


def refuse_settings_of_language_models(name: str, tokenization: Tokenization, reads: str) -> None:
    """Refuse packing and chat settings for a task that is not a language model.

    Args:
        name: the task's name.
        reads: what the task reads, and what it keeps of that, for the message.

    Raises:
        MisuseError: one of the settings is given; the message names the flags.
    """
    if tokenization.packing:
        raise MisuseError(f"--packing is for language models; --task {name} has one text or image per row")
    if tokenization.assistant_turns or tokenization.chat_template_kwargs or tokenization.truncation_side:
        raise MisuseError(
            "--assistant-turns, --chat-template-kwargs and --truncation-side are for the chats of language models; "
            f"--task {name} reads {reads}"
        )


def token_block(rows: TokenBlock | Sequence[TokenizedExample]) -> TokenBlock:
    """Convert rows to columns. There is at least one row, and all rows have the same fields set."""
    if isinstance(rows, TokenBlock):
        return rows
    labels = [NO_LABEL if row.label is None else row.label for row in rows]
    return TokenBlock(
        _ragged([row.input_ids for row in rows]),
        supervised=_joined([row.supervised for row in rows]),
        token_type_ids=_joined([row.token_type_ids for row in rows]),
        document_lengths=_joined([row.document_lengths for row in rows]),
        label=np.array(labels, dtype=np.int64),
        labels=_joined([row.labels for row in rows]),
        images=[row.image for row in rows if row.image is not None] or None,
        views=_joined([row.view for row in rows]),
        num_classes=rows[0].num_classes,
    )


def _joined(values: Sequence[np.ndarray | None]) -> Ragged | None:
    found = [each for each in values if each is not None]
    return _ragged(found) if found else None


def _ragged(values: Sequence[np.ndarray]) -> Ragged:
    return Ragged.of(np.concatenate(values), np.array([len(each) for each in values]))


def pad(rows: Ragged, value: int, length: int | None = None) -> Tensor:
    """Pad ragged integer rows on the right with `value`, to `length` or the longest row.

    Returns:
        (B, T) int64.
    """
    inside = _inside(rows, length)
    out = np.full(inside.shape, value, dtype=np.int64)
    out[inside] = rows.values
    return torch.from_numpy(out)


def attention_mask(rows: Ragged, length: int | None = None) -> Tensor:
    """Return the (B, T) int64 attention mask: 1 for tokens, 0 for padding."""
    return torch.from_numpy(_inside(rows, length).astype(np.int64))


def _inside(rows: Ragged, length: int | None) -> np.ndarray:
    """Return a (B, T) bool mask: True for the values of the rows, False for padding."""
    counts = rows.counts
    inside: np.ndarray = np.arange(length or counts.max()) < counts[:, None]
    return inside


def embedding_rows(model: Any) -> int:
    """Return the number of rows of a model's input embedding."""
    table = model.get_input_embeddings()
    rows = getattr(table, "num_embeddings", None) or getattr(getattr(table, "weight", None), "shape", [None])[0]
    return int(rows or model.config.get_text_config().vocab_size)


def kept_pad_id(model: Any) -> int | None:
    """Return a model's `config.pad_token_id`; None if it is not set or has no input embedding."""
    kept = model.config.get_text_config().pad_token_id
    return kept if isinstance(kept, int) and 0 <= kept < embedding_rows(model) else None


def free_pad_id(last_ids: Iterable[int], rows: int) -> int | None:
    """Return the smallest id below `rows` that is not in `last_ids`; None: there is none.

    No row ends with this id. As pad token it lets a model find the last token of each row.
    """
    taken = set(last_ids)
    return next((i for i in range(min(rows, len(taken) + 1)) if i not in taken), None)


def ids_beyond(rows: Iterable[TokenizedExample], limit: int) -> list[int]:
    """Return the sorted distinct token ids of rows that are at least `limit`."""
    return sorted({int(i) for row in rows if len(row.input_ids) for i in row.input_ids[row.input_ids >= limit]})


def named_ids(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Format the first few token ids with their tokens, for a message."""
    shown = ", ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" for i in ids[:5])
    return shown + (", ..." if len(ids) > 5 else "")


def check_ids(limit: int, rows: Iterable[TokenizedExample], tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse rows with token ids outside an input embedding of `limit` rows.

    Padding ids are not checked, since padding is masked.

    Raises:
        ModelError: there are such ids; the message names them and their tokens.
    """
    beyond = ids_beyond(rows, limit)
    if beyond:
        raise ModelError(
            f"{name}: the data set has token ids that the input embedding lacks, which has {limit}: {named_ids(beyond, tokenizer)}"
            "; use the tokenizer that the model was trained with, or train it after resize_token_embeddings"
        )
