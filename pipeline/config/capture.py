"""Configurations of train-teacher, cache-logits and estimate."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.data import DataConfig
from pipeline.config.options import (
    TaskName,
    check_positive,
    data_option,
    encoding_option,
    flag_name,
    machine_option,
    model_option,
    output_option,
    parse_bytes,
    parse_part,
    parse_rows,
    training_option,
)
from pipeline.errors import MisuseError
from pipeline.records import Encoding, Full, Judging, Sampled, Score, TopK, TopP

#: Classes requested from a server without --top-k: vLLM's default limit.
SERVED_TOP_K = 20
#: Settings that apply to local weights only, and to servers only.
_OF_WEIGHTS = (
    "base_model",
    "dtype",
    "attn_implementation",
    "device_map",
    "quantization",
    "torch_compile",
    "gpus_per_worker",
    "auto_batch_tokens",
)
_OF_SERVERS = ("server_model", "server_api", "check_with", "concurrency", "server_patience")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTeacherConfig:
    """Fine-tune a teacher on the task's hard labels."""

    task: TaskName = data_option("Task to train.")
    data: DataConfig
    model: str = model_option("Name or path of the pretrained model; a PEFT adapter directory is one too.")
    output: str = output_option("Directory of the fine-tuned model.")
    base_model: str | None = model_option("Base model of a PEFT adapter, in place of the one that it names.", None)
    epochs: float | None = training_option(
        "Passes over the labelled rows. Default, where --max-steps is not given either: 3, and more with few rows.",
        None,
    )
    max_steps: int | None = training_option("Optimizer steps; overrides --epochs where positive.", None)
    learning_rate: float | None = training_option("Peak learning rate. Default: chosen for the model.", None)
    batch_size: int | None = training_option("Rows per device and step. Default: 16.", None)
    seed: int = training_option("Seed of initialisation and order.", 0)
    overwrite: bool = output_option(
        "Delete the model and the checkpoints that the output directory holds, and start again.", False
    )
    on_bad_row: Literal["stop", "skip"] = data_option("What to do with a row whose text is empty.", "stop")
    report_to: tuple[str, ...] = training_option(
        "Report losses and metrics to tensorboard, wandb, trackio, ... as transformers has it; all: to what is installed; repeat for several. Default: none.",
        (),
    )
    training: dict[str, Any] = training_option("Any field of transformers.TrainingArguments.", {})

    def __post_init__(self) -> None:
        check_positive("--batch-size", self.batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLogitsConfig:
    """Run the teacher once over a data set and write its soft labels."""

    task: TaskName = data_option("Task of the teacher.")
    data: DataConfig
    unlabelled: tuple[str, ...] = data_option(
        "File or data set whose rows are added to the split train without labels; repeat for several.", ()
    )
    teacher: str = model_option("Name or path of the teacher; a PEFT adapter directory or a GGUF file is one too.")
    teacher_revision: str | None = model_option("Revision of a teacher on the hub.", None)
    base_model: str | None = model_option("Base model of a PEFT adapter, in place of the one that it names.", None)
    server: tuple[str, ...] = model_option(
        "Address of a vLLM or SGLang server that runs the teacher, as http://host:8000/v1; repeat for several. --teacher then names its tokenizer; a key is read from SOFTLABEL_SERVER_KEY.",
        (),
    )
    server_model: str | None = model_option(
        "The teacher's name at the server. Default: the only one that it serves.", None
    )
    server_api: Literal["vllm", "sglang"] | None = model_option("API of the server to use. Default: found out.", None)
    check_with: str | None = model_option(
        "Local weights of a served teacher: one row of the server is compared with theirs before the first shard.",
        None,
    )
    dtype: str = machine_option("Precision of the forward pass: auto, float32, bfloat16 or float16.", "auto")
    attn_implementation: str | None = machine_option("Attention implementation, as transformers names it.", None)
    device_map: str | None = machine_option("Spread the teacher over devices: auto, or a device.", None)
    quantization: Literal["4bit", "8bit"] | None = model_option("Load the teacher with bitsandbytes.", None)
    torch_compile: str | None = machine_option(
        "Compile the teacher with this backend of torch.compile, as inductor.", None
    )
    trust_remote_code: bool = model_option(
        "Run code that comes with the teacher. Never set by a cache or a manifest.", False
    )
    prompt_template: str | None = model_option(
        "Label classes with a language model: file with a Jinja template of the prompt, or default for the built-in one.",
        None,
    )
    label_text: tuple[str, ...] = model_option(
        "NAME=TEXT: a class and what a language model reads for it after the prompt, NAME alone for both; repeat for each. Default: the data's labels.",
        (),
    )
    prompt_format: Literal["auto", "chat", "plain"] = model_option(
        "Whether the prompt is a message in the chat template or plain text; auto: chat where the tokenizer has a template.",
        "auto",
    )
    shots: int = model_option("Examples in the prompt: labelled rows of train, of each label in turn.", 0)
    shot_tokens: int = model_option("Longest text of an example in the prompt, in tokens.", 64)
    calibrate: bool = model_option(
        "Divide each label's probability by its mean over prompts without content (contextual calibration).", False
    )
    encoding: Literal["full", "top-k", "top-p", "sampled"] | None = encoding_option(
        "What is kept of each distribution. Default: full for classifiers, sampled for language models.", None
    )
    top_k: int | None = encoding_option("Classes to keep with --encoding top-k.", None)
    top_p: float | None = encoding_option("Mass to keep with --encoding top-p.", None)
    sample_size: float | None = encoding_option(
        "c of --encoding sampled: about how many classes to keep where the teacher is unsure.", None
    )
    temperature: tuple[float, ...] = encoding_option(
        "Temperature(s) that students may train at; repeatable for top-k and top-p (default 1, 2, 4), one for sampled (default 1).",
        (),
    )
    store_entropy: bool = encoding_option(
        "Store the teacher's entropy at each position too (2 bytes), not only its sum over the row.", False
    )
    store_label_logprobs: bool = encoding_option(
        "Language models: store the teacher's log-probability of each token that follows too (2 bytes a position).",
        False,
    )
    output: str = output_option("Directory of the cache, or a URL that fsspec opens, as s3://bucket/cache.")
    overwrite: bool = output_option("Delete what the output directory holds, and start again.", False)
    append: bool = output_option("Add the rows that the data set has gained to a finished cache, as new shards.", False)
    rows: str | None = data_option("Cache only the rows A:B of each split (from 0, B excluded).", None)
    rows_per_shard: int | None = output_option(
        "Source rows in a shard; a killed run repeats at most one. Default: shards of about 128 MB.", None
    )
    batch_tokens: int | None = machine_option(
        "Tokens in a forward pass, padding included. Default: 8192 (classification), 2048 (language models).", None
    )
    auto_batch_tokens: bool = machine_option(
        "Measure before the first shard which number of tokens in a forward pass is fastest, and use it.", False
    )
    concurrency: int | None = machine_option(
        "Rows requested from servers at once by each worker. Default: raised until they get no faster.", None
    )
    server_patience: float = machine_option(
        "Seconds during which a request to a slow, restarted or dead server is repeated.", 600.0
    )
    engine: Literal["local", "ray"] = machine_option(
        "Where workers run: on this machine, or on Ray (an existing cluster, else a local one).", "local"
    )
    num_workers: int | None = machine_option(
        "Processes that share the shards. Default: this one; with Ray one for each GPU, or for each machine without.",
        None,
    )
    gpus_per_worker: int | None = machine_option(
        "GPUs of each worker; several hold one teacher together. Default: 1, where there are any.", None
    )
    part: str | None = machine_option(
        "Make part I of N (from 0), as 0/8: for arrays of jobs. The job that makes the last shard finishes the cache.",
        None,
    )
    seed: int = encoding_option("Seed of the sampled encoding.", 0)
    on_bad_row: Literal["stop", "skip"] = data_option(
        "What to do with a row whose logits are not finite or whose text is empty.", "stop"
    )

    def __post_init__(self) -> None:
        if self.encoding or self._named_by_knob():
            self.resolve_encoding("full")
        check_positive("--rows-per-shard", self.rows_per_shard)
        check_positive("--batch-tokens", self.batch_tokens)
        check_positive("--num-workers", self.num_workers)
        check_positive("--gpus-per-worker", self.gpus_per_worker)
        if self.auto_batch_tokens and self.batch_tokens is not None:
            raise MisuseError("--batch-tokens and --auto-batch-tokens: give one of them")
        if self.gpus_per_worker is not None and self.num_workers is None and self.engine == "local":
            raise MisuseError(
                "--gpus-per-worker goes with --num-workers or --engine ray; one process takes --device-map auto"
            )
        if self.append and self.overwrite:
            raise MisuseError("--append adds to a cache and --overwrite deletes it: give one of them")
        if self.part is not None and self.overwrite:
            raise MisuseError(
                "--part with --overwrite: each part would delete what the others have made; delete the old cache first, or use another --output"
            )
        if self.part is not None and self.engine == "ray":
            raise MisuseError(
                "--part is for arrays of jobs that know nothing of each other; --engine ray shares the shards itself"
            )
        self._check_server()
        self.row_range  # noqa: B018 - checks it
        self.parsed_part  # noqa: B018 - checks it
        self.judging  # noqa: B018 - checks it

    @property
    def judging(self) -> Judging | None:
        """Settings to label by prompt with a language model; None without such flags."""
        return judging_of(
            self.prompt_template, self.label_text, self.prompt_format, self.shots, self.shot_tokens, self.calibrate
        )

    def _check_server(self) -> None:
        """Check that flags for servers and for local weights are not mixed."""
        check_positive("--concurrency", self.concurrency)
        if not 0 < self.server_patience < math.inf:
            raise MisuseError(f"--server-patience: expected above 0 seconds, found {self.server_patience}")
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        given = [
            name for name in (_OF_WEIGHTS if self.server else _OF_SERVERS) if getattr(self, name) != defaults[name]
        ]
        if given and self.server:
            raise MisuseError(
                f"--{flag_name(given[0])} is for local weights, and --server has the teacher elsewhere: start the server with it, or leave out one of the two"
            )
        if given:
            raise MisuseError(f"--{flag_name(given[0])} goes with --server, found none")

    @property
    def uses_devices(self) -> bool:
        """Whether the teacher runs in the workers (on GPUs if available), not on a server."""
        return not self.server

    @property
    def top_logprobs(self) -> int:
        """Classes per position to request from a server: `--top-k`, or `SERVED_TOP_K`."""
        return self.top_k or SERVED_TOP_K

    @property
    def row_range(self) -> tuple[int, int | None] | None:
        """The parsed value of `--rows`; see `parse_rows`."""
        return parse_rows(self.rows)

    @property
    def parsed_part(self) -> tuple[int, int] | None:
        """The parsed value of `--part`: I and N; None: not given."""
        return parse_part(self.part)

    def _named_by_knob(self) -> str | None:
        knobs = {"top-k": self.top_k, "top-p": self.top_p, "sampled": self.sample_size}
        return next((kind for kind, value in knobs.items() if value is not None), None)

    def resolve_encoding(self, default_kind: str) -> Encoding:
        """The encoding given by flags, else the task's default kind.

        Raises:
            MisuseError: a parameter belongs to another encoding, or a value is out of range.
        """
        kind = self.encoding or self._named_by_knob() or default_kind
        top_k, temperatures = self.top_k, self.temperature
        if self.server and self.judging is None:  # servers return the top classes at temperature 1
            kind = self.encoding or ("top-p" if self.top_p is not None else "top-k")
            top_k, temperatures = self.top_logprobs, self.temperature or ((1.0,) if kind in ("top-k", "top-p") else ())
        for flag, value, owner in (
            ("--top-k", self.top_k, "top-k"),
            ("--top-p", self.top_p, "top-p"),
            ("--sample-size", self.sample_size, "sampled"),
        ):
            if value is not None and kind != owner and not (self.server and flag == "--top-k" and kind == "top-p"):
                raise MisuseError(
                    f"{flag} is a knob of --encoding {owner}, found --encoding {kind}; drop one of the two"
                )
        return make_encoding(kind, top_k, self.top_p, self.sample_size, temperatures)


def judging_of(
    template: str | None,
    label_text: tuple[str, ...],
    prompt_format: Literal["auto", "chat", "plain"] = "auto",
    shots: int = 0,
    shot_tokens: int = 64,
    calibrate: bool = False,
) -> Judging | None:
    """Check the settings to label by prompt; None if there is neither prompt nor label text.

    Raises:
        MisuseError: a value is out of range, or a setting of prompts is given without a prompt.
    """
    if shots < 0:
        raise MisuseError(f"--shots: expected at least 0, found {shots}")
    check_positive("--shot-tokens", shot_tokens)
    if template is None and not label_text and not shots:
        for flag, is_given in (("--prompt-format", prompt_format != "auto"), ("--calibrate", calibrate)):
            if is_given:
                raise MisuseError(
                    f"{flag} is for a language model that labels by prompt; add --prompt-template FILE, or --prompt-template default"
                )
        return None
    return Judging(
        None if template == "default" else template, label_text, prompt_format, shots, shot_tokens, calibrate
    )


def make_encoding(
    kind: str, top_k: int | None, top_p: float | None, sample_size: float | None, temperatures: tuple[float, ...]
) -> Encoding:
    """Make an encoding of the given kind from its parameters.

    Raises:
        MisuseError: a parameter is missing or out of range.
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
    if kind == "score":
        if temperatures:
            raise MisuseError("--temperature at capture is for distributions, and scores have none; leave it out")
        return Score()
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
    """Estimate what each encoding costs and loses, from a pilot; no cache is written."""

    task: TaskName = data_option("Task of the teacher.")
    data: DataConfig
    teacher: str = model_option("Name or path of the teacher.")
    teacher_revision: str | None = model_option("Revision of a teacher on the hub.", None)
    base_model: str | None = model_option("Base model of a PEFT adapter, in place of the one that it names.", None)
    dtype: str = machine_option("Precision of the forward pass: auto, float32, bfloat16 or float16.", "auto")
    attn_implementation: str | None = machine_option("Attention implementation, as transformers names it.", None)
    device_map: str | None = machine_option("Spread the teacher over devices: auto, or a device.", None)
    quantization: Literal["4bit", "8bit"] | None = model_option("Load the teacher with bitsandbytes.", None)
    torch_compile: str | None = machine_option(
        "Compile the teacher with this backend of torch.compile, as inductor.", None
    )
    trust_remote_code: bool = model_option("Run code that comes with the teacher.", False)
    batch_tokens: int | None = machine_option("Tokens in a forward pass, as cache-logits will take.", None)
    positions: int = encoding_option("Positions of the pilot.", 2048)
    temperature: float = encoding_option("Temperature of the noise figures and of a sampled cache.", 1.0)
    target_noise: float | None = encoding_option(
        "Choose the fewest bytes whose noise is at most this share of one drawn label's (of sampled and full, which have no bias).",
        None,
    )
    budget: str | None = encoding_option(
        "Choose the least noise that fits, as 500MB or 100GB (of sampled and full).", None
    )
    scale: float | None = machine_option("Project to so many tokens, as 1e12.", None)
    gpus: int = machine_option("With --scale: GPUs that share the work.", 1)
    write_config: str | None = output_option(
        "Write a YAML file with the chosen encoding, for softlabel cache-logits.", None
    )
    seed: int = encoding_option("Seed of the pilot.", 0)
    json: bool = output_option("Print JSON.", False)

    def __post_init__(self) -> None:
        check_positive("--positions", self.positions)
        check_positive("--gpus", self.gpus)
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
