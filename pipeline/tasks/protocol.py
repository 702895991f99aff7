"""What a task is: N supervised positions a row, each with a distribution over V classes, or a score."""

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
    """The protocol; implementations hold no state."""

    @property
    def name(self) -> str:
        """As `--task` names it."""

    @property
    def reads(self) -> Inputs:
        """What its models read."""

    @property
    def auto_class(self) -> Any:
        """The `transformers.AutoModelFor...` that loads a model with this task's head."""

    @property
    def peft_type(self) -> str | None:
        """The task as PEFT names it; None: it has no name for it, and adapters are refused."""

    @property
    def hub_category(self) -> str:
        """The task as the hub's search names it."""

    @property
    def usage(self) -> str:
        """How a student is used, for its card: Markdown with the fields `tag`, `folder` and `max_length`."""

    @property
    def marks_positions(self) -> bool:
        """Whether a row marks which of its tokens have soft labels; else it has one position, or one for each label name."""

    @property
    def label_source(self) -> LabelSource:
        """Where hard labels come from."""

    @property
    def names(self) -> LabelNames | None:
        """What has names, which contract and model state: the classes, or the positions of a row.

        A model that is trained gets a new head for those of its data.
        """

    @property
    def target(self) -> TargetKind:
        """What a position's target is."""

    @property
    def ranks(self) -> bool:
        """Whether scores rank the rows of lists, which a column of the data names."""

    @property
    def problem_type(self) -> str | None:
        """`config.problem_type` of its models, where their architecture is another task's too; None: the other one."""

    @property
    def predicts_tokens(self) -> bool:
        """Whether class i is token i of the tokenizer."""

    @property
    def fuses_head(self) -> bool:
        """Whether the loss can be taken chunk by chunk of the output embedding, so that (N, V) never exists."""

    @property
    def continues_prompts(self) -> bool:
        """Whether a model can go on from a prompt: write data sets, answer as a server, read chats."""

    @property
    def takes_token_types(self) -> bool:
        """Whether `token_type_ids` are stored where the tokenizer makes them."""

    @property
    def stores_text(self) -> bool:
        """Whether texts are stored where the user does not say."""

    @property
    def other_tokenizers(self) -> OtherTokenizers | None:
        """How a student with another tokenizer learns from a cache; None: it cannot."""

    @property
    def judged_by(self) -> str | None:
        """The task whose models can label this task's rows by prompt; None: no model can."""

    @property
    def default_encoding(self) -> Encoding:
        """What is kept where the user does not say."""

    @property
    def default_temperature(self) -> float:
        """What students train at where neither the user nor the encoding says."""

    @property
    def default_max_length(self) -> int:
        """Longest row in tokens, where the model would take longer ones and the user does not say."""

    @property
    def default_batch_tokens(self) -> int:
        """Tokens in a forward pass of the teacher: what keeps (N, V) logits at some hundred megabytes."""

    @property
    def default_eval_rows(self) -> int:
        """Rows in a forward pass of an evaluation."""

    @property
    def main_metric(self) -> str:
        """The metric that retention is taken of."""

    @property
    def higher_is_better(self) -> bool:
        """The direction of the main metric."""

    def check_columns(self, columns: Columns, tokenization: Tokenization) -> None:
        """Raise `MisuseError` for inputs that the task cannot use."""

    def settle(self, settings: Tokenization, tokenizer: PreTrainedTokenizerBase, *, chats: bool) -> Tokenization:
        """The settings as a contract states them: with all that the chat template decides, where there are chats.

        Raises:
            PipelineError: a chat template that cannot be used, or that does not read an argument
                given.
        """

    def num_classes(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
        """V of the soft labels that a model makes. Raises `ModelError` where it makes none."""

    def tokenize(
        self,
        examples: Iterable[Example | BadRow],
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: Tokenization,
        *,
        texts: bool = False,
    ) -> Iterator[TokenizedExample | BadRow]:
        """Examples of one shard -> rows of the cache, in order, with the supervised positions marked.

        Args:
            texts: language models: with the text or the messages that each row is of; the tokenizer
                is a fast one, and rows are not packed.
        """

    def default_positions(self, input_ids: np.ndarray) -> np.ndarray:
        """(T,) token ids of a row -> (T,) bool: its positions, where nothing says which they are and rows mark them."""

    def hard_labels(self, rows: TokenBlock | Sequence[TokenizedExample]) -> np.ndarray:
        """(N,) int64: the hard label of each supervised position of all rows, -100 where there is none; scores: float32, nan where there is none."""

    def collate(
        self,
        rows: TokenBlock | Sequence[TokenizedExample],
        pad_id: int,
        length: int | None = None,
        *,
        processor: Any = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Rows -> what a model's `forward` takes, (B, T) each, and the (B, T) mask of supervised positions (None: one a row).

        Args:
            processor: what stands in the place of a tokenizer where rows are images: it makes pixel
                values of them, (B, C, H, W).
        """

    def gather_logits(self, model: nn.Module, inputs: Mapping[str, Tensor], supervised: Tensor | None) -> Tensor:
        """One forward pass -> (N, V) logits at the supervised positions."""

    def at_positions(self, logits: Tensor, supervised: Tensor | None) -> Tensor:
        """What a model's `forward` returns as logits -> (N, V) at the supervised positions."""

    def metrics(self, predictions: Predictions, num_classes: int) -> dict[str, float]:
        """The columns of the evaluation table; has the main metric among them."""

    def row_scores(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """(R,) sums and (R,) weights, whose ratio of totals is the main metric: what the bootstrap resamples."""


def check_columns(task: Task, columns: Columns, tokenization: Tokenization) -> None:
    """Raise `MisuseError` for inputs that the task cannot use, and where lists are named that it does not rank, or none that it would."""
    if columns.image is not None and task.reads != "images":
        raise MisuseError(f"--image-column: --task {task.name} reads texts; give --task image-classification")
    if columns.choices and task.reads != "choices":
        raise MisuseError(f"--choices-column: --task {task.name} chooses no text; give --task multiple-choice")
    task.check_columns(columns, tokenization)
    if columns.group is not None and not task.ranks:
        raise MisuseError(
            f"--group-column: names the lists that scores rank, and --task {task.name} ranks none; leave it out"
        )
    if columns.group is None and task.ranks:
        raise MisuseError(
            f"--task {task.name} needs --group-column: the column whose rows of one value are a list, as the query or its number"
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
    """Whether hard labels are a column of the data set; else they are tokens of the text, and every row has them."""
    return task.label_source in ("row", "positions")


def may_lack_head(task: Task) -> bool:
    """Whether a model without the task's head gets a new one when it is trained: for the names of the data, or to fill masks."""
    return task.names is not None or task.label_source == "hidden"


def label_column(task: Task) -> LabelColumn:
    """What the label column of a data set holds, where there is one."""
    if task.target == "score":
        return "scores"
    if task.names == "places":
        return "answers"
    return "classes" if task.names == "positions" else "class"


def refuse_settings_of_language_models(name: str, tokenization: Tokenization, reads: str) -> None:
    """Refuse packing, and settings of chats.

    Args:
        name: of the task.
        reads: what it reads, and what of it it keeps, for the message.

    Raises:
        MisuseError: names the flags.
    """
    if tokenization.packing:
        raise MisuseError(f"--packing is for language models; --task {name} has one text or image a row")
    if tokenization.assistant_turns or tokenization.chat_template_kwargs or tokenization.truncation_side:
        raise MisuseError(
            "--assistant-turns, --chat-template-kwargs and --truncation-side are for the chats of language models; "
            f"--task {name} reads {reads}"
        )


def token_block(rows: TokenBlock | Sequence[TokenizedExample]) -> TokenBlock:
    """Rows by column. They have the same columns; there is at least one."""
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
    """Ragged integer rows -> (B, T) int64, filled on the right with `value` up to `length` or the longest row."""
    inside = _inside(rows, length)
    out = np.full(inside.shape, value, dtype=np.int64)
    out[inside] = rows.values
    return torch.from_numpy(out)


def attention_mask(rows: Ragged, length: int | None = None) -> Tensor:
    """(B, T) int64: 1 on tokens, 0 on padding."""
    return torch.from_numpy(_inside(rows, length).astype(np.int64))


def _inside(rows: Ragged, length: int | None) -> np.ndarray:
    """(B, T) bool: where the rows' own values stand."""
    counts = rows.counts
    inside: np.ndarray = np.arange(length or counts.max()) < counts[:, None]
    return inside


def embedding_rows(model: Any) -> int:
    """How many token ids a model has an input embedding for."""
    table = model.get_input_embeddings()
    rows = getattr(table, "num_embeddings", None) or getattr(getattr(table, "weight", None), "shape", [None])[0]
    return int(rows or model.config.get_text_config().vocab_size)


def kept_pad_id(model: Any) -> int | None:
    """`pad_token_id` of a model's configuration; None where it has none, or one without an input embedding."""
    kept = model.config.get_text_config().pad_token_id
    return kept if isinstance(kept, int) and 0 <= kept < embedding_rows(model) else None


def free_pad_id(last_ids: Iterable[int], rows: int) -> int | None:
    """The smallest of so many ids that no row ends with, so that its end is found behind it; None: there is none."""
    taken = set(last_ids)
    return next((i for i in range(min(rows, len(taken) + 1)) if i not in taken), None)


def ids_beyond(rows: Iterable[TokenizedExample], limit: int) -> list[int]:
    """The token ids of rows that an embedding of so many rows lacks, in order."""
    return sorted({int(i) for row in rows if len(row.input_ids) for i in row.input_ids[row.input_ids >= limit]})


def named_ids(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """A few token ids with their tokens."""
    shown = ", ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" for i in ids[:5])
    return shown + (", ..." if len(ids) > 5 else "")


def check_ids(limit: int, rows: Iterable[TokenizedExample], tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse rows with token ids beyond an input embedding of so many rows.

    Padding is not looked at: it is masked.

    Raises:
        ModelError: names the ids and their tokens.
    """
    beyond = ids_beyond(rows, limit)
    if beyond:
        raise ModelError(
            f"{name}: rows of the data set hold token ids without a row in the input embedding, which has {limit}: {named_ids(beyond, tokenizer)}"
            "; use the tokenizer that the model was trained with, or train it after resize_token_embeddings"
        )
