"""Configurations of init-student and train-student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.options import (
    cache_bytes_option,
    cache_dir_option,
    check_positive,
    data_option,
    loss_option,
    model_option,
    output_option,
    parse_bytes,
    training_option,
)
from pipeline.errors import MisuseError
from pipeline.records import Divergence, Loss, PositionWeights, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class InitStudentConfig:
    """Make a student: a smaller config with random weights, or chosen layers of the teacher."""

    teacher: str = model_option(
        "Name or path of the teacher, whose architecture the student takes, and its tokenizer where --tokenizer names no other."
    )
    output: str = output_option("Directory of the student.")
    layer: tuple[int, ...] = model_option(
        "Layer of the teacher to copy, from 0; repeat for several. Default: a third of them, evenly spaced, where no shape is given.",
        (),
    )
    num_layers: int | None = model_option("Layers of a student with random weights.", None)
    hidden_size: int | None = model_option("Width of a student with random weights.", None)
    num_heads: int | None = model_option("Attention heads of a student with random weights.", None)
    tokenizer: str | None = model_option(
        "Tokenizer of the student: a directory, a hub name, or train:SIZE for a byte-level BPE of so many tokens, trained on the text of --cache. "
        "Default: the teacher's.",
        None,
    )
    cache: str | None = data_option(
        "With --tokenizer train:SIZE: directory or URL of the cache whose text (split train) the tokenizer is trained on.",
        None,
    )
    seed: int = model_option("Seed of the random weights.", 0)

    def __post_init__(self) -> None:
        is_trained = self.tokenizer is not None and trained_size(self.tokenizer) is not None
        if is_trained and self.cache is None:
            raise MisuseError(f"--tokenizer {self.tokenizer}: needs --cache, whose text the tokenizer is trained on")
        if self.cache is not None and not is_trained:
            raise MisuseError("--cache goes with --tokenizer train:SIZE, which is trained on its text")
        shape = (self.num_layers, self.hidden_size, self.num_heads)
        if self.layer and any(value is not None for value in shape):
            raise MisuseError(
                "--layer copies layers of the teacher; --num-layers, --hidden-size, --num-heads make new ones: use one or the other"
            )
        if any(value is None for value in shape) and any(value is not None for value in shape):
            raise MisuseError(
                "--num-layers, --hidden-size and --num-heads go together; without them evenly spaced layers of the teacher are copied"
            )


def trained_size(tokenizer: str) -> int | None:
    """Parse SIZE, the number of tokens, of `train:SIZE`; None for a name or a path.

    Raises:
        MisuseError: SIZE is not an integer above 256, the number of bytes.
    """
    kind, colon, size = tokenizer.partition(":")
    if kind != "train" or not colon:
        return None
    if not (size.isascii() and size.isdigit()) or int(size) < 256:
        raise MisuseError(
            f"--tokenizer {tokenizer}: expected train:SIZE with a number of tokens of at least 256 (all bytes) and the special tokens, as train:8192"
        )
    return int(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStudentConfig:
    """Train a student from a cache, without the teacher."""

    cache: tuple[str, ...] = data_option("Directory or URL of the cache; repeat to mix several.")
    student: str = model_option("Name or path of the student; a PEFT adapter directory is one too.")
    output: str = output_option("Directory of the trained student.")
    base_model: str | None = model_option("Base model of a PEFT adapter, in place of the one that it names.", None)
    mix: Literal["teachers", "data"] | None = data_option(
        "Several caches: of the same rows, labelled by several teachers, or of different data. Default: what --teacher-weight or --proportion says.",
        None,
    )
    teacher_weight: tuple[float, ...] = loss_option(
        "Weight of a teacher in the soft term, in the order of --cache; repeat for each. Default: alike.", ()
    )
    proportion: tuple[float, ...] = data_option(
        "Share of a cache in the rows of an epoch, in the order of --cache; repeat for each. Default: every row once.",
        (),
    )
    split: tuple[str, ...] = data_option("Split to train on; repeat for several, whose rows are mixed.", ("train",))
    hard_weight: float | None = loss_option(
        "Weight of the cross-entropy with the hard labels. The two weights need not sum to 1. Default: chosen.", None
    )
    soft_weight: float | None = loss_option(
        "Weight of the T^2-scaled divergence from the teacher; 0 trains on labels alone. Default: chosen.", None
    )
    temperature: float | None = loss_option(
        "Softens both distributions. Default: a sampled cache's own, else chosen.", None
    )
    divergence: Divergence | None = loss_option("What is minimised between teacher and student. Default: chosen.", None)
    tail_policy: Literal["ghost", "renormalize", "ignore"] = loss_option(
        "The teacher's mass outside the kept classes (top-k, top-p).", "ghost"
    )
    mixture: float | None = loss_option(
        "The teacher's share in what jensen-shannon (default 0.5) and skewed-kl (default 0.1) compare with.", None
    )
    weight_schedule: Schedule = loss_option(
        "How the two weights go to their end values over the run: linear, cosine; warmup-stable-decay rises from 0 in the first tenth and falls in the last fifth.",
        "constant",
    )
    hard_weight_end: float | None = loss_option("Hard weight at the end of the schedule.", None)
    soft_weight_end: float | None = loss_option("Soft weight at the end of the schedule.", None)
    position_weights: PositionWeights = loss_option(
        "Soft term: count positions equally, or by how certain or uncertain the teacher is there (language models: cache with --store-entropy).",
        "equal",
    )
    align: Literal["map", "spans", "both"] = loss_option(
        "Students with another tokenizer, the soft term: the teacher's tokens mapped to the student's; the likelihood of spans of text that both begin "
        "and end (cache with --store-label-logprobs); or both, each at the soft weight.",
        "map",
    )
    hard_labels: Literal["data", "teacher"] = loss_option(
        "Whose hard labels: the data's, or the teacher's most likely class (a control).", "data"
    )
    epochs: float | None = training_option(
        "Passes over the split. Default, where --max-steps is not given either: until the evaluation stops improving, "
        "within a number of steps that is chosen.",
        None,
    )
    max_steps: int | None = training_option("Optimizer steps; overrides --epochs where positive.", None)
    learning_rate: float | None = training_option("Peak learning rate. Default: chosen for student and data.", None)
    batch_size: int | None = training_option("Rows per device and step. Default: chosen for the task.", None)
    batch_tokens: int | None = training_option(
        "Group rows by length, and end a batch where it would pass so many tokens, padding included; --batch-size stays the most rows.",
        None,
    )
    eval_split: str | None = data_option(
        "Split to evaluate on during training. Default: validation; without it, rows of --split that are held out by their content.",
        None,
    )
    early_stopping: int | None = training_option(
        "Stop after so many evaluations without a better metric_for_best_model (default loss), and keep the best; 0: never. "
        "Default: 5, or never with --epochs or --max-steps.",
        None,
    )
    seed: int = training_option("Seed of order and dropout.", 0)
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = output_option(
        "Precision of the finished student's weights; training is in float32. auto: as the student's own files.", "auto"
    )
    resume: bool = training_option("Continue from the newest complete checkpoint in the output directory.", False)
    overwrite: bool = output_option(
        "Delete the student and the checkpoints that the output directory holds, and start again.", False
    )
    lora_r: int | None = model_option("Train a LoRA adapter of this rank instead of all weights.", None)
    lora_alpha: int | None = model_option("LoRA scale. Default: twice the rank.", None)
    lora_target: tuple[str, ...] = model_option(
        "Module to adapt; repeat for several. Default: PEFT's for the architecture.", ()
    )
    trust_remote_code: bool = model_option("Run code that comes with the student.", False)
    cache_dir: str | None = cache_dir_option()
    cache_bytes: str = cache_bytes_option()
    report_to: tuple[str, ...] = training_option(
        "Report losses and metrics to tensorboard, wandb, trackio, ... as transformers has it; all: to what is installed; repeat for several. Default: none.",
        (),
    )
    training: dict[str, Any] = training_option("Any field of transformers.TrainingArguments.", {})

    def __post_init__(self) -> None:
        if isinstance(self.cache, str):  # Python callers may give a single string
            object.__setattr__(self, "cache", (self.cache,))
        if isinstance(self.split, str):
            object.__setattr__(self, "split", (self.split,))
        if not self.split or len(set(self.split)) < len(self.split):
            raise MisuseError(f"--split: expected splits, each once, found {', '.join(self.split) or 'none'}")
        if self.align == "spans" and self.soft_weight_end is not None:
            raise MisuseError("--soft-weight-end does not go with --align spans, whose weight no schedule changes")
        self.loss_over(Loss())  # checks the weights and the temperature
        if not self.cache:
            raise MisuseError("--cache: expected at least one")
        if (self.mix or self.teacher_weight or self.proportion) and len(self.cache) < 2:
            raise MisuseError("--mix, --teacher-weight and --proportion go with several --cache")
        if self.teacher_weight and (self.proportion or self.mix == "data"):
            raise MisuseError(
                "--teacher-weight goes with --mix teachers, --proportion with --mix data: use one of them"
            )
        if self.proportion and self.mix == "teachers":
            raise MisuseError("--proportion goes with --mix data; --mix teachers takes --teacher-weight")
        if self.resume and self.overwrite:
            raise MisuseError("--resume continues from checkpoints and --overwrite deletes them: give only one of them")
        check_positive("--batch-size", self.batch_size)
        check_positive("--batch-tokens", self.batch_tokens)
        if self.early_stopping is not None and self.early_stopping < 0:
            raise MisuseError(f"--early-stopping: expected at least 0, found {self.early_stopping}")
        check_positive("--lora-r", self.lora_r)
        parse_bytes("--cache-bytes", self.cache_bytes)
        if self.lora_r is None and (self.lora_alpha is not None or self.lora_target):
            raise MisuseError("--lora-alpha and --lora-target go with --lora-r")

    @property
    def mix_kind(self) -> Literal["teachers", "data"] | None:
        """How several caches are mixed: `--mix`, or implied by weights or proportions."""
        implied: Literal["teachers", "data"] | None = (
            "teachers" if self.teacher_weight else "data" if self.proportion else None
        )
        return self.mix or implied

    def loss_over(self, chosen: Loss) -> Loss:
        """The loss of the flags; fields without a flag are taken from `chosen`.

        The temperature of `chosen` is used only if the divergence is that of `chosen`.
        """
        divergence = self.divergence or chosen.divergence
        same = divergence == chosen.divergence
        soft = chosen.soft_weight if self.soft_weight is None else self.soft_weight
        return Loss(
            hard_weight=chosen.hard_weight if self.hard_weight is None else self.hard_weight,
            soft_weight=0.0 if self.align == "spans" else soft,
            span_weight=0.0 if self.align == "map" else soft,
            temperature=chosen.temperature if self.temperature is None and same else self.temperature,
            divergence=divergence,
            tail=self.tail_policy,
            mixture=self.mixture,
            schedule=self.weight_schedule,
            hard_weight_end=self.hard_weight_end,
            soft_weight_end=self.soft_weight_end,
            position_weights=self.position_weights,
        )
