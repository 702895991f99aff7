"""Configurations of evaluate and predict."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.options import (
    cache_bytes_option,
    cache_dir_option,
    check_positive,
    data_option,
    machine_option,
    model_option,
    output_option,
    parse_bytes,
)
from pipeline.errors import MisuseError


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Compare students with their teacher, from the cache alone."""

    cache: str = data_option("Directory or URL of the cache.")
    student: tuple[str, ...] = model_option("Student directory, or NAME=DIR; repeat for several.")
    base_model: str | None = model_option(
        "Base model of the students that are PEFT adapters, in place of the one that they name.", None
    )
    split: str = data_option("Split to evaluate on.", "test")
    output: str | None = output_option("Directory for evaluation.json. Default: none is written.", None)
    write_rows: int = data_option(
        "Encoder-decoders: rows of the split to write target texts for, which are compared with the data's by chrF; 0: none.",
        200,
    )
    prompt: tuple[str, ...] = data_option("Language models: text that each model continues; repeat for several.", ())
    teacher: str | None = model_option(
        "With --prompt, and for encoder-decoders: the teacher, to write texts too. Nothing else uses it.", None
    )
    batch_size: int | None = machine_option(
        "Rows per forward pass. Default: 32 (classification), 4 (language models).", None
    )
    cache_dir: str | None = cache_dir_option()
    cache_bytes: str = cache_bytes_option()
    json: bool = output_option("Print JSON instead of a table.", False)

    def __post_init__(self) -> None:
        if not self.student:
            raise MisuseError("--student: expected at least one directory")
        check_positive("--batch-size", self.batch_size)
        parse_bytes("--cache-bytes", self.cache_bytes)
        if self.write_rows < 0:
            raise MisuseError(f"--write-rows: expected at least 0, found {self.write_rows}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictConfig:
    """Try a model: likely labels of a text or an image, or the continuation by a language model."""

    model: str = model_option("Name or path of a classifier or language model: a student, a teacher, an adapter.")
    base_model: str | None = model_option("Base model of a PEFT adapter, in place of the one that it names.", None)
    text: tuple[str, ...] = data_option(
        "Text; repeat for several. Default: a text a line, from --input or standard input.", ()
    )
    image: tuple[str, ...] = data_option("File of an image, for models of images; repeat for several.", ())
    choice: tuple[str, ...] = data_option(
        "Models of multiple choice: a text to choose from for --text; repeat for each.", ()
    )
    context: str | None = data_option(
        "Models of question answering: the text that the answer to --text stands in.", None
    )
    input: str | None = data_option(
        "File with a text a line, UTF-8; for models of images, the path of a file a line.", None
    )
    top: int = output_option("Classifiers: how many labels to show.", 3)
    max_new_tokens: int = model_option("Language models: how many tokens to add, greedily.", 40)
    max_length: int | None = data_option(
        "Classifiers: longest text in tokens; what is longer is cut. Default: as the student was trained, else what the model takes.",
        None,
    )
    trust_remote_code: bool = model_option("Run code that comes with the model.", False)
    json: bool = output_option("Print a JSON object a line.", False)

    def __post_init__(self) -> None:
        given = [name for name in ("text", "image", "input") if getattr(self, name)]
        if len(set(self.choice)) < len(self.choice) or not all(map(str.strip, self.choice)):
            raise MisuseError("--choice: expected different texts, none of them empty")
        if self.context is not None and not self.context.strip():
            raise MisuseError("--context: expected a text, found an empty one")
        if len(self.choice) == 1:
            raise MisuseError("--choice: expected two or more, found one; repeat it for each text to choose from")
        if len(given) > 1:
            raise MisuseError(f"--{given[0]} and --{given[1]}: give one of the two")
        check_positive("--top", self.top)
        check_positive("--max-new-tokens", self.max_new_tokens)
        check_positive("--max-length", self.max_length)
