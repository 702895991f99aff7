"""Which data set, and how it is read: shared by all commands that read one."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.options import data_option as option
from pipeline.errors import MisuseError
from pipeline.records import Columns, Tokenization


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which data set, which of its columns, and how texts become tokens."""

    dataset: str = option(
        "Hub name, a jsonl/json/csv/tsv/parquet/arrow/text file, a glob of such files, or a directory: one file or folder per split, the hub's layout, or one "
        "written by save_to_disk."
    )
    data_files: tuple[str, ...] = option(
        "SPLIT=PATTERN: which files in the directory are which split; repeat for several.", ()
    )
    dataset_config: str | None = option("Configuration of a hub data set.", None)
    dataset_revision: str | None = option("Revision of a hub data set.", None)
    split: tuple[str, ...] = option("Split to read; repeat for several. Default: all.", ())
    holdout: float = option(
        "Share of `train` to set aside as `test`, chosen by content, where there is no `test`.", 0.0
    )
    text_column: str = option("Column with the text.", "text")
    text_pair_column: str | None = option("Column with the second text of a pair.", None)
    messages_column: str | None = option(
        "Column with chats ({role, content} lists); only the assistant's turns are supervised.", None
    )
    prompt_column: str | None = option("Column with prompts; goes with --completion-column.", None)
    completion_column: str | None = option("Column with completions, which alone are supervised.", None)
    input_ids_column: str | None = option("Column with token ids, for data that is already tokenized.", None)
    labels_column: str | None = option(
        "With --input-ids-column: token labels, -100 where a token is not to be learnt.", None
    )
    label_column: str = option("Column with the hard label; it may be missing, on some rows or on all.", "label")
    label_map: tuple[str, ...] = option(
        "Class labels: DATA=MODEL, a name or number of the data and the model's class (name, LABEL_i or number); repeat for several.",
        (),
    )
    keep_column: tuple[str, ...] = option("Column to copy into the cache as it is; repeat for several.", ())
    max_length: int | None = option(
        "Longest row in tokens. Default: as the teacher was trained (cache-logits), else what the model takes, at most 512 (classification) or 1024.",
        None,
    )
    packing: bool = option("Language models: pack several documents into a row, with EOS between them.", False)
    isolate_documents: bool = option("With --packing: attention does not cross documents.", False)
    chat_template: str | None = option(
        "File with a Jinja chat template that marks {% generation %}, if the tokenizer's does not.", None
    )
    store_text: bool = option(
        "Keep the texts, so that a student with another tokenizer can train (classification).", True
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
        if self.isolate_documents and not self.packing:
            raise MisuseError("--isolate-documents goes with --packing: without packing a row is one document")
        for item in self.label_map:
            data, _, model = item.rpartition("=")
            if not data.strip() or not model.strip():
                raise MisuseError(f"--label-map: expected DATA=MODEL, found {item!r}")
        inputs = [c for c in (self.messages_column, self.prompt_column, self.input_ids_column) if c is not None]
        if inputs and self.text_pair_column is not None:
            inputs.append(self.text_pair_column)
        if len(inputs) > 1:
            raise MisuseError(f"one kind of input at a time: found the columns {', '.join(inputs)}")

    @property
    def columns(self) -> Columns:
        """The columns named, with `text` only where nothing else is the input."""
        other = self.messages_column or self.prompt_column or self.input_ids_column
        return Columns(
            text=None if other else self.text_column,
            text_pair=self.text_pair_column,
            messages=self.messages_column,
            prompt=self.prompt_column,
            completion=self.completion_column,
            input_ids=self.input_ids_column,
            labels=self.labels_column,
            label=self.label_column,
            keep=self.keep_column,
        )

    def tokenization(self, max_length: int) -> Tokenization:
        """How texts become tokens, once the longest row is known."""
        return Tokenization(max_length=max_length, packing=self.packing, isolate_documents=self.isolate_documents)
