"""Configuration of init."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.options import TaskName, data_option, model_option, output_option
from pipeline.errors import MisuseError


@dataclass(frozen=True, slots=True, kw_only=True)
class InitConfig:
    """Look at a data set and write a commented YAML file for `softlabel run`."""

    dataset: str = data_option(
        "Data set: a file, a directory, a glob, a hub name or a URL. (There is no --data-files: give each split a file of its name.)"
    )
    unlabelled: tuple[str, ...] = data_option(
        "File or data set with more texts, which have no label; repeat for several.", ()
    )
    output: str = output_option("YAML file to write.")
    task: TaskName | None = data_option("Task of the teacher. Default: detected from the columns.", None)
    text_column: str | None = data_option("Column with the text. Default: found out.", None)
    text_pair_column: str | None = data_option("Column with the second text of a pair.", None)
    label_column: str | None = data_option("Column with the class. Default: found out.", None)
    label_map: tuple[str, ...] = data_option(
        "DATA=MODEL: class of --teacher that a label of the data is; repeat for several.", ()
    )
    messages_column: str | None = data_option("Column with chats. Default: found out.", None)
    prompt_column: str | None = data_option("Column with prompts; goes with --completion-column.", None)
    completion_column: str | None = data_option("Column with completions. Default: found out.", None)
    dataset_config: str | None = data_option("Configuration of a hub data set.", None)
    model: str | None = model_option(
        "Name or path of a pretrained model, which is fine-tuned into the teacher. Default for classification: a small encoder from the hub.",
        None,
    )
    teacher: str | None = model_option(
        "Name or path of a teacher that needs no more training; instead of --model. Language models need one of the two.",
        None,
    )
    runs: str | None = output_option(
        "Directory for what the stages make. Default: runs/ and the name of the YAML file.", None
    )
    overwrite: bool = output_option("Replace the YAML file.", False)

    def __post_init__(self) -> None:
        if self.model is not None and self.teacher is not None:
            raise MisuseError("--model is fine-tuned first, --teacher is used as it is: give one of them")
        if (self.prompt_column is None) != (self.completion_column is None):
            raise MisuseError("--prompt-column and --completion-column go together; give both or neither")
        inputs = [self.text_column, self.messages_column, self.prompt_column]
        if sum(name is not None for name in inputs) > 1:
            raise MisuseError("--text-column, --messages-column and --prompt-column: give one of them")
        if self.label_column is not None and self.label_column == self.text_column:
            raise MisuseError(f"--label-column {self.label_column}: is the text column too; name another")
        if self.text_pair_column is not None and self.text_pair_column in (self.text_column, self.label_column):
            other = "text" if self.text_pair_column == self.text_column else "label"
            raise MisuseError(f"--text-pair-column {self.text_pair_column}: is the {other} column too; name another")
