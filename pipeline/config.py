"""One frozen dataclass per command, and the YAML file that fills them.

Each field carries its help text, so that the command line, the YAML keys and the documentation have one source.
A file has `task:` and `data:` at the top, shared by all commands, and a section per command:

    task: sequence-classification
    data: {dataset: data/bbc}
    cache-logits: {teacher: runs/teacher, output: runs/cache}

The commands stand on one page, longer than others, because the file's keys and their help are read together.

Precedence: flag, then the command's section, then the shared part, then the default. Unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.errors import ConfigError, MisuseError
from pipeline.records import (
    Columns,
    Divergence,
    Encoding,
    Full,
    Loss,
    PositionWeights,
    Sampled,
    Schedule,
    Tokenization,
    TopK,
    TopP,
)

TaskName = Literal["sequence-classification", "causal-lm"]
ConfigType = TypeVar("ConfigType")


def option(text: str, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field with its help text."""
    metadata = {"help": text}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


# ------------------------------------------------------------------------------------------------------- sections


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which data set, which of its columns, and how texts become tokens."""

    dataset: str = option("Hub name, a jsonl/csv/parquet/text file, or a directory with one such file per split.")
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
    keep_column: tuple[str, ...] = option("Column to copy into the cache as it is; repeat for several.", ())
    max_length: int | None = option(
        "Longest row in tokens. Default: what the model takes, at most 512 (classification) or 1024.", None
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTeacherConfig:
    """Fine-tune a teacher on the task's hard labels."""

    task: TaskName = option("What is learnt.")
    data: DataConfig
    model: str = option("Name or path of the pretrained model.")
    output: str = option("Directory of the fine-tuned model.")
    epochs: float = option("Passes over the labelled rows.", 3.0)
    max_steps: int = option("Optimizer steps; overrides --epochs where positive.", -1)
    learning_rate: float = option("Peak learning rate.", 5e-5)
    batch_size: int = option("Rows per device and step.", 16)
    seed: int = option("Seed of initialisation and order.", 0)
    training: dict[str, Any] = option("Any field of transformers.TrainingArguments.", {})

    def __post_init__(self) -> None:
        _check_positive("--batch-size", self.batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLogitsConfig:
    """Run the teacher once over a data set and write its soft labels."""

    task: TaskName = option("What the teacher predicts.")
    data: DataConfig
    teacher: str = option("Name or path of the teacher; a PEFT adapter directory or a GGUF file is one too.")
    teacher_revision: str | None = option("Revision of a teacher on the hub.", None)
    dtype: str = option("Precision of the forward pass: auto, float32, bfloat16 or float16.", "auto")
    attn_implementation: str | None = option("Attention implementation, as transformers names it.", None)
    device_map: str | None = option("Spread the teacher over devices: auto, or a device.", None)
    quantization: Literal["4bit", "8bit"] | None = option("Load the teacher with bitsandbytes.", None)
    trust_remote_code: bool = option("Run code that comes with the teacher. Never set by a cache or a manifest.", False)
    encoding: Literal["full", "top-k", "top-p", "sampled"] | None = option(
        "What is kept of each distribution. Default: full for classifiers, sampled for language models.", None
    )
    top_k: int | None = option("Classes to keep with --encoding top-k.", None)
    top_p: float | None = option("Mass to keep with --encoding top-p.", None)
    sample_size: float | None = option(
        "c of --encoding sampled: about how many classes to keep where the teacher is unsure.", None
    )
    temperature: tuple[float, ...] = option(
        "Temperature(s) that students may train at; repeatable for top-k and top-p (default 1, 2, 4), one for sampled (default 1).",
        (),
    )
    store_entropy: bool = option(
        "Store the teacher's entropy at each position too (2 bytes), not only its sum over the row.", False
    )
    output: str = option("Directory of the cache.")
    overwrite: bool = option("Delete what the output directory holds and start anew.", False)
    rows_per_shard: int | None = option(
        "Source rows in a shard; a killed run repeats at most one. Default: shards of about 128 MB.", None
    )
    batch_tokens: int | None = option(
        "Tokens in a forward pass, padding included. Default: 8192 (classification), 2048 (language models).", None
    )
    seed: int = option("Seed of the sampled encoding.", 0)
    on_bad_row: Literal["stop", "skip"] = option(
        "What to do with a row whose logits are not finite or whose text is empty.", "stop"
    )

    def __post_init__(self) -> None:
        if self.encoding or self._named_by_knob():
            self.resolve_encoding("full")
        _check_positive("--rows-per-shard", self.rows_per_shard)
        _check_positive("--batch-tokens", self.batch_tokens)

    def _named_by_knob(self) -> str | None:
        knobs = {"top-k": self.top_k, "top-p": self.top_p, "sampled": self.sample_size}
        return next((kind for kind, value in knobs.items() if value is not None), None)

    def resolve_encoding(self, default_kind: str) -> Encoding:
        """The encoding that the flags name, or the task's default kind.

        Raises:
            MisuseError: a knob of another encoding, or a value out of range.
        """
        kind = self.encoding or self._named_by_knob() or default_kind
        for flag, value, owner in (
            ("--top-k", self.top_k, "top-k"),
            ("--top-p", self.top_p, "top-p"),
            ("--sample-size", self.sample_size, "sampled"),
        ):
            if value is not None and kind != owner:
                raise MisuseError(
                    f"{flag} is a knob of --encoding {owner}, found --encoding {kind}; drop one of the two"
                )
        return make_encoding(kind, self.top_k, self.top_p, self.sample_size, self.temperature)


def make_encoding(
    kind: str, top_k: int | None, top_p: float | None, sample_size: float | None, temperatures: tuple[float, ...]
) -> Encoding:
    """The encoding of one name and its knobs, checked.

    Raises:
        MisuseError: a missing or impossible knob.
    """
    if not all(0 < t < math.inf for t in temperatures):
        raise MisuseError(f"--temperature: expected above 0, found {', '.join(map(str, temperatures))}")
    grid = tuple(sorted(set(temperatures))) or (1.0, 2.0, 4.0)
    if kind == "full":
        if temperatures:
            raise MisuseError(
                "--temperature at capture goes with top-k, top-p and sampled; full serves any temperature"
            )
        return Full()
    if kind == "top-k":
        if top_k is None or top_k < 1:
            raise MisuseError(f"--encoding top-k needs --top-k of at least 1, found {top_k}")
        return TopK(top_k, grid)
    if kind == "top-p":
        if top_p is None or not 0 < top_p <= 1:
            raise MisuseError(f"--encoding top-p needs --top-p in (0, 1], found {top_p}")
        return TopP(top_p, grid)
    if len(temperatures) > 1:
        raise MisuseError("--encoding sampled serves exactly one --temperature; use top-k, top-p or full for several")
    size = Sampled().sample_size if sample_size is None else sample_size
    if not 1 <= size < math.inf:
        raise MisuseError(f"--sample-size: expected at least 1, found {size}")
    return Sampled(size, temperatures[0] if temperatures else 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateConfig:
    """Say what each encoding would cost and lose, from a pilot; no cache is written."""

    task: TaskName = option("What the teacher predicts.")
    data: DataConfig
    teacher: str = option("Name or path of the teacher.")
    teacher_revision: str | None = option("Revision of a teacher on the hub.", None)
    dtype: str = option("Precision of the forward pass: auto, float32, bfloat16 or float16.", "auto")
    attn_implementation: str | None = option("Attention implementation, as transformers names it.", None)
    device_map: str | None = option("Spread the teacher over devices: auto, or a device.", None)
    quantization: Literal["4bit", "8bit"] | None = option("Load the teacher with bitsandbytes.", None)
    trust_remote_code: bool = option("Run code that comes with the teacher.", False)
    batch_tokens: int | None = option("Tokens in a forward pass, as cache-logits will take.", None)
    positions: int = option("Positions of the pilot.", 2048)
    temperature: float = option("Temperature of the noise figures and of a sampled cache.", 1.0)
    target_noise: float | None = option(
        "Choose the fewest bytes whose noise is at most this share of one drawn label's (of sampled and full, which have no bias).",
        None,
    )
    budget: str | None = option("Choose the least noise that fits, as 500MB or 100GB (of sampled and full).", None)
    scale: float | None = option("Project to so many tokens, as 1e12.", None)
    gpus: int = option("With --scale: GPUs that share the work.", 1)
    write_config: str | None = option("Write a YAML file with the chosen encoding, for softlabel cache-logits.", None)
    seed: int = option("Seed of the pilot.", 0)
    json: bool = option("Print JSON.", False)

    def __post_init__(self) -> None:
        _check_positive("--positions", self.positions)
        _check_positive("--gpus", self.gpus)
        if self.target_noise is not None and self.budget is not None:
            raise MisuseError("--target-noise and --budget each choose an encoding: give one of them")
        if self.write_config is not None and self.target_noise is None and self.budget is None:
            raise MisuseError("--write-config goes with --target-noise or --budget, which choose the encoding")
        if self.target_noise is not None and not 0 < self.target_noise < math.inf:
            raise MisuseError(f"--target-noise: expected above 0, found {self.target_noise}")
        if not 0 < self.temperature < math.inf:
            raise MisuseError(f"--temperature: expected above 0, found {self.temperature}")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise MisuseError(f"--scale: expected above 0 tokens, found {self.scale}")
        if self.budget is not None:
            parse_bytes("--budget", self.budget)


def parse_bytes(flag: str, text: str) -> int:
    """A size as people write it: 500MB, 1.5 TB; decimal units.

    Raises:
        MisuseError: no number, or another unit.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGTP]?)B?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise MisuseError(f"{flag}: expected a size as 500MB or 100GB, found {text!r}")
    return int(float(found[1]) * 1000 ** " KMGTP".index(found[2].upper() or " "))


@dataclass(frozen=True, slots=True, kw_only=True)
class InitStudentConfig:
    """Make a student: a smaller config with random weights, or chosen layers of the teacher."""

    teacher: str = option("Name or path of the teacher, whose architecture and tokenizer the student takes.")
    output: str = option("Directory of the student.")
    layer: tuple[int, ...] = option("Layer of the teacher to copy, from 0; repeat for several.", ())
    num_layers: int | None = option("Layers of a student with random weights.", None)
    hidden_size: int | None = option("Width of a student with random weights.", None)
    num_heads: int | None = option("Attention heads of a student with random weights.", None)
    seed: int = option("Seed of the random weights.", 0)

    def __post_init__(self) -> None:
        shape = (self.num_layers, self.hidden_size, self.num_heads)
        if self.layer and any(value is not None for value in shape):
            raise MisuseError(
                "--layer copies layers of the teacher; --num-layers, --hidden-size, --num-heads make new ones: use one or the other"
            )
        if not self.layer and any(value is None for value in shape):
            raise MisuseError("give --layer (repeatable), or all of --num-layers, --hidden-size, --num-heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStudentConfig:
    """Train a student from a cache, without the teacher."""

    cache: str = option("Directory of the cache.")
    student: str = option("Name or path of the student; a PEFT adapter directory is one too.")
    output: str = option("Directory of the trained student.")
    split: str = option("Split to train on.", "train")
    hard_weight: float = option(
        "Weight of the cross-entropy with the hard labels. The two weights need not sum to 1.", 0.5
    )
    soft_weight: float = option("Weight of the T^2-scaled divergence from the teacher; 0 trains on labels alone.", 0.5)
    temperature: float | None = option(
        "Softens both distributions. Default: a sampled cache's own, else 2 for classes and 1 for tokens.", None
    )
    divergence: Divergence = option("What is minimised between teacher and student.", "forward-kl")
    tail_policy: Literal["ghost", "renormalize", "ignore"] = option(
        "The teacher's mass outside the kept classes (top-k, top-p).", "ghost"
    )
    mixture: float | None = option(
        "The teacher's share in what jensen-shannon (default 0.5) and skewed-kl (default 0.1) compare with.", None
    )
    weight_schedule: Schedule = option(
        "How the two weights go to their end values over the run: linear, cosine; warmup-stable-decay rises from 0 in the first tenth and falls in the last fifth.",
        "constant",
    )
    hard_weight_end: float | None = option("Hard weight at the end of the schedule.", None)
    soft_weight_end: float | None = option("Soft weight at the end of the schedule.", None)
    position_weights: PositionWeights = option(
        "Soft term: count positions equally, or by how certain or uncertain the teacher is there (language models: cache with --store-entropy).",
        "equal",
    )
    hard_labels: Literal["data", "teacher"] = option(
        "Whose hard labels: the data's, or the teacher's most likely class (a control).", "data"
    )
    epochs: float = option("Passes over the split.", 3.0)
    max_steps: int = option("Optimizer steps; overrides --epochs where positive.", -1)
    learning_rate: float = option("Peak learning rate.", 5e-5)
    batch_size: int = option("Rows per device and step.", 16)
    batch_tokens: int | None = option(
        "Group rows by length, and end a batch where it would pass so many tokens, padding included; --batch-size stays the most rows.",
        None,
    )
    eval_split: str | None = option(
        "Split to evaluate on during training (training: {eval_strategy: ...}). Default: validation.", None
    )
    early_stopping: int | None = option(
        "Stop after so many evaluations without a better metric_for_best_model (default loss), and keep the best.", None
    )
    seed: int = option("Seed of order and dropout.", 0)
    resume: bool = option("Go on from the newest whole checkpoint in the output directory.", False)
    lora_r: int | None = option("Train a LoRA adapter of this rank instead of all weights.", None)
    lora_alpha: int | None = option("LoRA scale. Default: twice the rank.", None)
    lora_target: tuple[str, ...] = option(
        "Module to adapt; repeat for several. Default: PEFT's for the architecture.", ()
    )
    trust_remote_code: bool = option("Run code that comes with the student.", False)
    training: dict[str, Any] = option("Any field of transformers.TrainingArguments.", {})

    def __post_init__(self) -> None:
        self.loss  # noqa: B018 - checks the weights and the temperature
        _check_positive("--batch-size", self.batch_size)
        _check_positive("--batch-tokens", self.batch_tokens)
        _check_positive("--early-stopping", self.early_stopping)
        _check_positive("--lora-r", self.lora_r)
        if self.lora_r is None and (self.lora_alpha is not None or self.lora_target):
            raise MisuseError("--lora-alpha and --lora-target go with --lora-r")

    @property
    def loss(self) -> Loss:
        """The loss that the flags describe."""
        return Loss(
            hard_weight=self.hard_weight,
            soft_weight=self.soft_weight,
            temperature=self.temperature,
            divergence=self.divergence,
            tail=self.tail_policy,
            mixture=self.mixture,
            schedule=self.weight_schedule,
            hard_weight_end=self.hard_weight_end,
            soft_weight_end=self.soft_weight_end,
            position_weights=self.position_weights,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Compare students with their teacher, from the cache alone."""

    cache: str = option("Directory of the cache.")
    student: tuple[str, ...] = option("Student directory, or NAME=DIR; repeat for several.")
    split: str = option("Split to evaluate on.", "test")
    output: str | None = option("Directory for evaluation.json. Default: none is written.", None)
    prompt: tuple[str, ...] = option("Language models: text that each model continues; repeat for several.", ())
    teacher: str | None = option("With --prompt: the teacher, to continue it too. Nothing else uses it.", None)
    batch_size: int | None = option("Rows per forward pass. Default: 32 (classification), 4 (language models).", None)
    json: bool = option("Print JSON instead of a table.", False)

    def __post_init__(self) -> None:
        if not self.student:
            raise MisuseError("--student: expected at least one directory")
        _check_positive("--batch-size", self.batch_size)
        if self.teacher is not None and not self.prompt:
            raise MisuseError(
                "--teacher goes with --prompt: it is only loaded to continue texts; its metrics come from the cache"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyConfig:
    """Check every byte of a cache against its manifest."""

    cache: str = option("Directory of the cache.")
    quick: bool = option("Only hashes, sizes, columns and the counts in the footers: nothing is decoded.", False)
    repair: bool = option("Drop broken shards, so that the same cache-logits command makes them again.", False)
    json: bool = option("Print JSON.", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectConfig:
    """Show what a cache holds."""

    cache: str = option("Directory of the cache.")
    split: str | None = option("Split of the rows to show. Default: the first.", None)
    rows: int = option("How many rows to show.", 2)
    tokens: int = option("How many tokens of each row to show (language models).", 24)
    top: int = option("How many soft labels to show for each position.", 4)
    json: bool = option("Print the contract, totals and shard table as JSON.", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportConfig:
    """Make a cache of what vLLM or an OpenAI-compatible server has returned."""

    input: tuple[str, ...] = option("JSON-lines file with one response a line; repeat for several.")
    output: str = option("Directory of the cache.")
    tokenizer: str = option("Name or path of the teacher's tokenizer.")
    teacher: str = option("Name of the teacher, for the manifest.")
    top_k: int = option("Log-probabilities to keep of each position: as many as the server returned.", 20)
    split: str = option("Split that the rows become.", "train")
    position_zero: Literal["auto", "empty", "filled"] = option(
        "Whether the first entry is empty, each speaking of its own token (vLLM, OpenAI), or filled, speaking of the next. auto finds out.",
        "auto",
    )
    max_length: int | None = option("Longest row in tokens that is allowed. Default: the longest that comes.", None)
    overwrite: bool = option("Delete what the output directory holds and start anew.", False)

    def __post_init__(self) -> None:
        _check_positive("--top-k", self.top_k)
        if not self.input:
            raise MisuseError("--input: expected at least one file")


#: What `run` runs, in this order.
STAGES: dict[str, type] = {
    "train-teacher": TrainTeacherConfig,
    "cache-logits": CacheLogitsConfig,
    "init-student": InitStudentConfig,
    "train-student": TrainStudentConfig,
    "evaluate": EvaluateConfig,
}

#: Every command that a YAML file may have a section for.
SECTIONS: dict[str, type] = {
    **STAGES,
    "estimate": EstimateConfig,
    "verify": VerifyConfig,
    "inspect": InspectConfig,
    "import": ImportConfig,
}


# -------------------------------------------------------------------------------------------------------- the file


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A parsed YAML file: the shared part, and for each stage a list of sections (several students, for one)."""

    path: str
    shared: Mapping[str, Any]
    sections: Mapping[str, tuple[Mapping[str, Any], ...]]


def load_config(path: str | Path) -> ConfigFile:
    """Read a YAML file and check every key in it.

    Raises:
        ConfigError: no such file, no YAML, or an unknown key (the nearest one is suggested).
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a YAML file with a section per command") from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping with a section per command, found {type(content).__name__}")
    shared: dict[str, Any] = {}
    sections: dict[str, tuple[Mapping[str, Any], ...]] = {}
    for key, value in content.items():
        _check_key(path, "", key, ["task", "data", *SECTIONS])
        if key == "task":
            shared["task"] = value
        elif key == "data":
            shared["data"] = _checked_section(path, "data", value, DataConfig)
        else:
            parts = value if isinstance(value, list) else [value]
            sections[key] = tuple(_checked_section(path, key, part, SECTIONS[key]) for part in parts)
    return ConfigFile(str(path), shared, sections)


def resolve(
    config_type: type[ConfigType], file: ConfigFile | None, section: Mapping[str, Any], flags: Mapping[str, Any]
) -> ConfigType:
    """The command's configuration from flags, its section and the shared part, in that order of precedence.

    Args:
        config_type: one of the dataclasses of this module.
        file: the YAML file, for its shared part.
        section: the command's part of the file.
        flags: only what was given on the command line, by field name (those of `DataConfig` beside the others).

    Raises:
        MisuseError: a required option is missing, or options contradict each other.
        ConfigError: a value of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    values: dict[str, Any] = {}
    names = {f.name for f in dataclasses.fields(config_type)}  # type: ignore[arg-type]
    if file is not None and "task" in names and "task" in file.shared:
        values["task"] = file.shared["task"]
    values.update(section)
    if "data" in names:
        shared_data = file.shared.get("data", {}) if file is not None else {}
        values["data"] = {**shared_data, **section.get("data", {})}
        data_names = {f.name for f in dataclasses.fields(DataConfig)}
        values["data"].update({k: v for k, v in flags.items() if k in data_names and k not in names})
    values.update({k: v for k, v in flags.items() if k in names})
    where = f"{file.path}: " if file is not None else ""
    for owner, given in ((config_type, values), (DataConfig, values.get("data"))):
        if given is None:
            continue
        missing = [_flag(f) for f in dataclasses.fields(owner) if _required(f) and f.name not in given]  # type: ignore[arg-type]
        if missing:
            raise MisuseError(f"{where}missing {', '.join(missing)}; give the flag, or the key in --config FILE.yaml")
    try:
        return TypeAdapter(config_type).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        found = "" if isinstance(first["input"], dict) else f", found {first['input']!r}"
        raise ConfigError(f"{where}{key.replace('_', '-') or config_type.__name__}: {first['msg']}{found}") from None


def cli_fields(config_type: type) -> Iterator[dataclasses.Field[Any]]:
    """The fields that become flags: those of the command, and of its data section."""
    for item in dataclasses.fields(config_type):
        if item.name == "data":
            yield from dataclasses.fields(DataConfig)
        elif item.name != "training":
            yield item


def _check_positive(flag: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise MisuseError(f"{flag}: expected at least 1, found {value}")


def _required(item: dataclasses.Field[Any]) -> bool:
    return item.name != "data" and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _flag(item: dataclasses.Field[Any]) -> str:
    return "--" + item.name.replace("_", "-")


def _checked_section(path: str | Path, name: str, value: Any, config_type: type) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {name}: expected a mapping, found {value!r}")
    known = [f.name for f in dataclasses.fields(config_type)]
    section = {}
    for key, item in value.items():
        field_name = str(key).replace("-", "_")
        _check_key(path, f"{name}: ", field_name, known)
        if field_name in section:
            raise ConfigError(f"{path}: {name}: {field_name} is given twice")
        section[field_name] = (
            _checked_section(path, f"{name}: data", item, DataConfig) if field_name == "data" else item
        )
    for listed in (f.name for f in dataclasses.fields(config_type) if str(f.type).startswith("tuple[")):
        value = section.get(listed, ())
        if not isinstance(value, list | tuple):
            section[listed] = [] if value is None else [value]
    return section


def _check_key(path: str | Path, where: str, key: Any, known: list[str]) -> None:
    if key in known:
        return
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"
    raise ConfigError(f"{path}: {where}unknown key {key!r}{hint}")
