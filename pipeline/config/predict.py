"""The command that uses a student: predict."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.options import check_positive, data_option, model_option, output_option
from pipeline.errors import MisuseError


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictConfig:
    """Try a model: the likeliest labels of a text, or how a language model goes on."""

    model: str = model_option("Name or path of a classifier or language model: a student, a teacher, an adapter.")
    base_model: str | None = model_option("Base model of a PEFT adapter, in place of the one that it names.", None)
    text: tuple[str, ...] = data_option(
        "Text; repeat for several. Default: a text a line, from --input or standard input.", ()
    )
    input: str | None = data_option("File with a text a line, UTF-8.", None)
    top: int = output_option("Classifiers: how many labels to show.", 3)
    max_new_tokens: int = model_option("Language models: how many tokens to add, greedily.", 40)
    max_length: int | None = data_option(
        "Classifiers: longest text in tokens; what is longer is cut. Default: as the student was trained, else what the model takes.",
        None,
    )
    trust_remote_code: bool = model_option("Run code that comes with the model.", False)
    json: bool = output_option("Print a JSON object a line.", False)

    def __post_init__(self) -> None:
        if self.text and self.input is not None:
            raise MisuseError("--text and --input: give one of the two")
        check_positive("--top", self.top)
        check_positive("--max-new-tokens", self.max_new_tokens)
        check_positive("--max-length", self.max_length)
