"""The data set and how it is read, shared by all commands that read one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.options import check_positive
from pipeline.config.options import data_option as option
from pipeline.errors import MisuseError
from pipeline.records import AssistantTurns, Columns, Masking, Tokenization, Views

#: Arguments of chat templates that the pipeline sets itself.
_GIVEN = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "conversations")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The data set, its columns, and how texts are tokenized."""

    dataset: str = option(
        "Hub name, a jsonl/json/csv/tsv/parquet/arrow/text file, a glob of such files, or a directory: one file or folder per split, the hub's layout, or one "
        "written by save_to_disk; the same behind a URL that fsspec opens, as s3://bucket/data."
    )
    data_files: tuple[str, ...] = option(
        "SPLIT=PATTERN: which files in the directory are which split; repeat for several. Rows of files without the label column have no label.",
        (),
    )
    dataset_config: str | None = option("Configuration of a hub data set.", None)
    dataset_revision: str | None = option("Revision of a hub data set.", None)
    split: tuple[str, ...] = option("Split to read; repeat for several. Default: all.", ())
    holdout: float = option(
        "Share of `train` to set aside as `test`, chosen by content, where there is no `test`.", 0.0
    )
    text_column: str = option("Column with the text.", "text")
    text_pair_column: str | None = option("Column with the second text of a pair.", None)
    choices_column: tuple[str, ...] = option(
        "Multiple choice: column with lists of texts, of which one is the answer to --text-column; or the flag once for each choice. --text-pair-column begins each choice.",
        (),
    )
    image_column: str | None = option(
        "Column with images: those of datasets, bytes, or paths relative to the data set. Folders of images have the column image.",
        None,
    )
    words_column: str | None = option(
        "Column with lists of words, each of which gets a label; --label-column holds lists of as many labels.", None
    )
    messages_column: str | None = option(
        "Column with chats ({role, content} lists); only the assistant's turns are supervised.", None
    )
    prompt_column: str | None = option("Column with prompts; goes with --completion-column.", None)
    completion_column: str | None = option("Column with completions, which alone are supervised.", None)
    input_ids_column: str | None = option("Column with token ids, for data that is already tokenized.", None)
    labels_column: str | None = option(
        "With --input-ids-column: token labels, -100 where a token is not to be learnt.", None
    )
    label_column: str = option(
        "Column with the hard label; it may be missing, on some rows or on all. Token classification: lists of labels, or spans {start, end, label} of the text; several labels at once: lists.",
        "label",
    )
    label_map: tuple[str, ...] = option(
        "Class labels: DATA=MODEL, a name or number of the data and the model's class (name, LABEL_i or number); repeat for several.",
        (),
    )
    group_column: str | None = option(
        "Rankings: column whose rows of one value are a list to be ranked, as the documents of a query; they stand one after another.",
        None,
    )
    keep_column: tuple[str, ...] = option("Column to copy into the cache as it is; repeat for several.", ())
    max_length: int | None = option(
        "Longest row in tokens. Default: as the teacher was trained (cache-logits), else what the model takes, at most 512 (classification) or 1024.",
        None,
    )
    stride: int | None = option(
        "Question answering: tokens that two windows of a long text share. Default: 128, at most half of the room.",
        None,
    )
    packing: bool = option("Language models: pack several documents into a row, with EOS between them.", False)
    isolate_documents: bool = option("With --packing: attention does not cross documents.", False)
    mask_share: float | None = option("Masked language models: share of the tokens to hide. Default: 0.15.", None)
    whole_words: bool = option("Masked language models: hide all tokens of a word or none.", False)
    mask_copies: int | None = option(
        "Masked language models: rows to make of each text, each with another mask. Default: 1.", None
    )
    mask_seed: int | None = option("Masked language models: seed of the masks. Default: 0.", None)
    views: int | None = option(
        "Images: rows to make of each image of train, each a random part of it. Default: one, the whole image.", None
    )
    view_area: float | None = option(
        "With --views: share of the image's area that a part has at least. Default: 0.08.", None
    )
    view_mirror: bool | None = option(
        "With --views: mirror half of the parts, left to right. Not for digits and letters. Default: mirror.", None
    )
    view_seed: int | None = option("With --views: seed of the parts. Default: 0.", None)
    chat_template: str | None = option("File with a Jinja chat template, in place of the tokenizer's.", None)
    chat_template_kwargs: tuple[str, ...] = option(
        "KEY=VALUE: argument of the chat template, as enable_thinking=false; repeat for several.", ()
    )
    assistant_turns: AssistantTurns = option(
        "Chats: supervise all turns of the assistant, in the fewest rows in which each has its own context (auto) or in one row (all), "
        "each in a row of its own, or the last alone.",
        "auto",
    )
    truncation_side: Literal["right", "left"] = option(
        "Where chats and prompts that are too long lose tokens.", "right"
    )
    store_text: bool | None = option(
        "Keep the texts, and of chats the messages, so that a student with another tokenizer can train. Default: classification alone.",
        None,
    )

    store_images: bool | None = option(
        "Keep the images in the cache; else path and hash of each, and students read the images below SOFTLABEL_IMAGES (default: here). Default: keep.",
        None,
    )

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise MisuseError(f"--holdout: expected a share in [0, 1), found {self.holdout}")
        if self.max_length is not None and self.max_length < 2:
            raise MisuseError(f"--max-length: expected at least 2 tokens, found {self.max_length}")
        if (self.prompt_column is None) != (self.completion_column is None):
            raise MisuseError("--prompt-column and --completion-column go together; give both or neither")
        if self.labels_column is not None and self.input_ids_column is None:
            raise MisuseError("--labels-column goes with --input-ids-column; for class labels use --label-column")
        if self.mask_share is not None and not 0 < self.mask_share < 1:
            raise MisuseError(f"--mask-share: expected a share between 0 and 1, found {self.mask_share}")
        check_positive("--mask-copies", self.mask_copies)
        check_positive("--views", self.views)
        if self.stride is not None and self.stride < 0:
            raise MisuseError(f"--stride: expected at least 0 tokens, found {self.stride}")
        if self.views is None and (self.view_area, self.view_mirror, self.view_seed) != (None, None, None):
            raise MisuseError("--view-area, --view-mirror and --view-seed go with --views")
        if self.isolate_documents and not self.packing:
            raise MisuseError("--isolate-documents goes with --packing: without packing a row is one document")
        chat_template_kwargs(self.chat_template_kwargs)
        for item in self.label_map:
            data, _, model = item.rpartition("=")
            if not data.strip() or not model.strip():
                raise MisuseError(f"--label-map: expected DATA=MODEL, found {item!r}")
        self._views  # noqa: B018 - checks it
        named = (
            self.image_column,
            self.words_column,
            self.messages_column,
            self.prompt_column,
            self.input_ids_column,
        )
        inputs = [column for column in named if column is not None]
        if inputs and self.text_pair_column is not None:
            inputs.append(self.text_pair_column)
        if len(inputs) > 1:
            raise MisuseError(f"one kind of input at a time: found the columns {', '.join(inputs)}")

    @property
    def columns(self) -> Columns:
        """The chosen columns; `text` is the input only if no other input is given.

        Raises:
            MisuseError: a text column is given together with another input.
        """
        texts = self.words_column or self.messages_column or self.prompt_column
        other = texts or self.input_ids_column or self.image_column
        if other and self.text_column not in (Columns().text, other):
            raise MisuseError(
                f"--text-column {self.text_column}: one kind of input at a time, found the column {other} too; leave one of them out"
            )
        return Columns(
            text=None if other else self.text_column,
            text_pair=self.text_pair_column,
            image=self.image_column,
            choices=self.choices_column,
            words=self.words_column,
            messages=self.messages_column,
            prompt=self.prompt_column,
            completion=self.completion_column,
            input_ids=self.input_ids_column,
            labels=self.labels_column,
            label=self.label_column,
            keep=self.keep_column,
            group=self.group_column,
        )

    def tokenization(self, max_length: int) -> Tokenization:
        """The settings of tokenization, for a given maximum length."""
        return Tokenization(
            max_length=max_length,
            packing=self.packing,
            isolate_documents=self.isolate_documents,
            assistant_turns=None if self.assistant_turns == "auto" else self.assistant_turns,
            chat_template_kwargs=chat_template_kwargs(self.chat_template_kwargs),
            truncation_side="left" if self.truncation_side == "left" else None,
            masking=self._masking,
            views=self._views,
            stride=self.stride,
        )

    @property
    def _views(self) -> Views | None:
        """The settings of image views; None: no views."""
        if self.views is None:
            return None
        usual = Views(self.views)
        return Views(
            self.views,
            usual.smallest if self.view_area is None else self.view_area,
            usual.mirror if self.view_mirror is None else self.view_mirror,
            self.view_seed or usual.seed,
        )

    @property
    def _masking(self) -> Masking | None:
        """The settings of masking; None: none is given."""
        if self.mask_share is None and not self.whole_words and self.mask_copies is None and self.mask_seed is None:
            return None
        usual = Masking()
        return Masking(
            usual.share if self.mask_share is None else self.mask_share,
            self.whole_words,
            self.mask_copies or usual.copies,
            self.mask_seed or usual.seed,
        )


#: The columns of each kind of input; a row has one kind.
_KINDS = (
    ("text_column", "text_pair_column"),
    ("image_column",),
    ("words_column",),
    ("messages_column",),
    ("prompt_column", "completion_column"),
    ("input_ids_column", "labels_column"),
)


def over(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the shared settings of a data set with those of a section, which take precedence.

    If the section names columns of one kind of input, shared columns of other kinds are dropped,
    for example token ids in place of chats.
    """
    named = [kind for kind in _KINDS if any(own.get(column) is not None for column in kind)]
    dropped = {column for kind in _KINDS if named and kind not in named for column in kind}
    return {**{name: value for name, value in shared.items() if name not in dropped}, **own}


def chat_template_kwargs(items: Iterable[str]) -> tuple[str, ...]:
    """Convert arguments of a chat template from `KEY=VALUE` to `KEY=JSON`, sorted by key.

    A value is parsed as JSON (false, 3, "3"), or as True, False or None; any other is text.

    Raises:
        MisuseError: a key is missing, given twice, or set by the pipeline itself.
    """
    found: dict[str, object] = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key.isidentifier():
            raise MisuseError(f"--chat-template-kwargs: expected KEY=VALUE, found {item!r}")
        if key in found or key in _GIVEN:
            why = "is given twice" if key in found else "is what the pipeline gives to the template itself"
            raise MisuseError(f"--chat-template-kwargs {key}: {why}; leave it out")
        found[key] = _value(value)
    return tuple(f"{key}={json.dumps(value, sort_keys=True)}" for key, value in sorted(found.items()))


def _value(text: str) -> object:
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text
