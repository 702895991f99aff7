"""Configuration of generate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pipeline.config.data import DataConfig, chat_template_kwargs
from pipeline.config.options import (
    check_positive,
    data_option,
    machine_option,
    model_option,
    output_option,
    parse_part,
    parse_rows,
    sampling_option,
)
from pipeline.errors import MisuseError

#: Faults of completions that `--drop` accepts.
Fault = Literal["empty", "cut", "repeated", "duplicate"]
FAULTS: tuple[Fault, ...] = ("empty", "cut", "repeated", "duplicate")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """Write a data set with a language model: completions of prompts, or labelled examples."""

    model: str = model_option(
        "Name or path of the model that writes; a PEFT adapter directory or a GGUF file is one too. With --server: of its tokenizer."
    )
    server: tuple[str, ...] = model_option(
        "Address of a server with the OpenAI API whose model writes, as http://host:8000/v1; repeat to share the requests among "
        "several. --model names the tokenizer then. The key is read from SOFTLABEL_SERVER_KEY.",
        (),
    )
    server_model: str | None = model_option("Name of the model on the server. Default: the one that it serves.", None)
    model_revision: str | None = model_option("Revision of a model on the hub.", None)
    base_model: str | None = model_option("Base model of a PEFT adapter, in place of the one that it names.", None)
    dtype: str = machine_option("Precision of the forward pass: auto, float32, bfloat16 or float16.", "auto")
    attn_implementation: str | None = machine_option("Attention implementation, as transformers names it.", None)
    device_map: str | None = machine_option("Spread the model over devices: auto, or a device.", None)
    quantization: Literal["4bit", "8bit"] | None = model_option("Load the model with bitsandbytes.", None)
    trust_remote_code: bool = model_option("Run code that comes with the model.", False)
    dataset: str | None = data_option(
        "The prompts: what --dataset of cache-logits takes. With --template: labelled rows, for --shots and the names of the labels.",
        None,
    )
    data_files: tuple[str, ...] = data_option(
        "SPLIT=PATTERN: which files in the directory are which split; repeat for several.", ()
    )
    dataset_config: str | None = data_option("Configuration of a hub data set.", None)
    dataset_revision: str | None = data_option("Revision of a hub data set.", None)
    split: tuple[str, ...] = data_option(
        "Split to read; repeat for several. Default: all; with --template the split train.", ()
    )
    rows: str | None = data_option("Only the rows A:B of each split (from 0, B excluded).", None)
    prompt_column: str | None = data_option(
        "Column with prompts: texts, or lists of {role, content} turns. Default: prompt, where there is such a column.",
        None,
    )
    messages_column: str | None = data_option(
        "Column with chats; the turns of the assistant at the end are removed and written again. Default: messages, where there "
        "is such a column and no column prompt.",
        None,
    )
    text_column: str | None = data_option(
        "With --prefix-tokens, and of the labelled rows: column with the texts. Default: text.", None
    )
    prefix_tokens: int | None = data_option(
        "Plain texts: the first tokens of each text, so many, are its prompt. Shorter texts are set aside, and counted.",
        None,
    )
    as_chat: bool = data_option(
        "A prompt that is text is one turn of the user, rendered with the chat template.", False
    )
    chat_template: str | None = data_option("File with a Jinja chat template, in place of the tokenizer's.", None)
    chat_template_kwargs: tuple[str, ...] = data_option(
        "KEY=VALUE: argument of the chat template, as enable_thinking=false; repeat for several.", ()
    )
    keep_column: tuple[str, ...] = data_option("Column to copy from the prompts' rows; repeat for several.", ())
    template: str | None = data_option(
        "File with a Jinja template of a prompt that asks for an example of a label; it reads label, labels, number and shots.",
        None,
    )
    label: tuple[str, ...] = data_option(
        "With --template: name of a label; repeat for each. Default: the labels of --dataset.", ()
    )
    label_column: str = data_option("With --template and --dataset: column with the label.", "label")
    num_examples: int | None = data_option(
        "With --template: prompts in all, dealt to the labels in turn. Required with it.", None
    )
    shots: int = data_option(
        "With --template and --dataset: labelled rows of the same label that the template gets as shots, drawn for each prompt.",
        0,
    )
    num_samples: int = sampling_option("Completions of each prompt.", 1)
    max_new_tokens: int = sampling_option("Longest completion in tokens; longer ones are cut there.", 256)
    temperature: float = sampling_option("Of the draws; 0 takes the most likely token.", 1.0)
    top_p: float | None = sampling_option("Draw from the fewest tokens whose mass reaches this.", None)
    top_k: int | None = sampling_option("Draw from so many of the most likely tokens.", None)
    min_p: float | None = sampling_option(
        "Draw from the tokens of at least this share of the most likely one's probability.", None
    )
    stop: tuple[str, ...] = sampling_option(
        "Text that ends a completion, and is left out of its text; repeat for several.", ()
    )
    seed: int = sampling_option("Seed of the draws.", 0)
    drop: tuple[Literal["empty", "cut", "repeated", "duplicate", "none"], ...] = output_option(
        "Completions to leave out: empty, cut at --max-new-tokens, with an n-gram loop, or the same as one before; repeat for "
        "several. Default: none; with --template all four.",
        (),
    )
    output: str = output_option("Directory of the data set.")
    overwrite: bool = output_option("Delete what the output directory holds, and start again.", False)
    rows_per_shard: int | None = output_option(
        "Rows of prompts in a shard; a killed run repeats at most one. Default: shards of about 250 completions.", None
    )
    batch_tokens: int = machine_option(
        "Tokens of a batch: rows times the longest prompt with its new tokens. Part of what makes the same bytes.",
        16384,
    )
    concurrency: int | None = machine_option(
        "Requests in flight at most, to all servers. Default: found by raising it until throughput stops growing.", None
    )
    server_patience: float = machine_option(
        "Seconds during which a request to servers that are down, slow or overloaded is repeated.", 600.0
    )
    engine: Literal["local", "ray"] = machine_option(
        "Where workers run: on this machine, or on Ray (an existing cluster, else a local one).", "local"
    )
    num_workers: int | None = machine_option(
        "Processes that share the shards. Default: this one; with Ray one for each GPU, or for each machine without.",
        None,
    )
    gpus_per_worker: int | None = machine_option(
        "GPUs of each worker; several hold one model together. Default: 1, where there are any.", None
    )
    part: str | None = machine_option(
        "Make part I of N (from 0), as 0/8: for arrays of jobs. The job that makes the last shard finishes the data set.",
        None,
    )
    on_bad_row: Literal["stop", "skip"] = data_option(
        "What to do with a row that is no prompt, or whose prompt is too long for the model.", "stop"
    )

    def __post_init__(self) -> None:
        self._check_sampling()
        self._check_prompts()
        for flag, value in (
            ("--rows-per-shard", self.rows_per_shard),
            ("--batch-tokens", self.batch_tokens),
            ("--num-workers", self.num_workers),
            ("--gpus-per-worker", self.gpus_per_worker),
            ("--prefix-tokens", self.prefix_tokens),
            ("--num-examples", self.num_examples),
            ("--concurrency", self.concurrency),
        ):
            check_positive(flag, value)
        if not 0 < self.server_patience < math.inf:
            raise MisuseError(f"--server-patience: expected seconds above 0, found {self.server_patience}")
        self._check_server()
        if self.gpus_per_worker is not None and self.num_workers is None and self.engine == "local":
            raise MisuseError(
                "--gpus-per-worker goes with --num-workers or --engine ray; one process takes --device-map auto"
            )
        if self.part is not None and self.overwrite:
            raise MisuseError(
                "--part with --overwrite: each part would delete what the others have made; delete the old data set first, or use another --output"
            )
        if self.part is not None and self.engine == "ray":
            raise MisuseError(
                "--part is for arrays of jobs that know nothing of each other; --engine ray shares the shards itself"
            )
        if "none" in self.drop and len(self.drop) > 1:
            raise MisuseError(f"--drop none cannot be combined with others, found {', '.join(self.drop)}")
        self.row_range  # noqa: B018 - checks it
        self.parsed_part  # noqa: B018 - checks it

    def _check_server(self) -> None:
        if not self.server:
            if self.server_model is not None or self.concurrency is not None:
                raise MisuseError("--server-model and --concurrency go with --server")
            return
        local = {
            "--dtype": self.dtype != "auto",
            "--attn-implementation": self.attn_implementation is not None,
            "--device-map": self.device_map is not None,
            "--quantization": self.quantization is not None,
            "--base-model": self.base_model is not None,
            "--gpus-per-worker": self.gpus_per_worker is not None,
        }
        given = next((flag for flag, is_given in local.items() if is_given), None)
        if given is not None:
            raise MisuseError(f"{given} goes with a local model; the model of a --server is as it was started")

    def _check_sampling(self) -> None:
        check_positive("--num-samples", self.num_samples)
        check_positive("--max-new-tokens", self.max_new_tokens)
        check_positive("--top-k", self.top_k)
        if not 0 <= self.temperature < math.inf:
            raise MisuseError(f"--temperature: expected at least 0, found {self.temperature}")
        for flag, share in (("--top-p", self.top_p), ("--min-p", self.min_p)):
            if share is not None and not 0 < share <= 1:
                raise MisuseError(f"{flag}: expected a share in (0, 1], found {share}")
        if self.temperature == 0:
            if self.num_samples > 1:
                raise MisuseError(
                    f"--temperature 0 takes the most likely token, so that all {self.num_samples} samples of a prompt would be "
                    "the same; use --num-samples 1, or a temperature above 0"
                )
            given = [f for f, v in (("--top-p", self.top_p), ("--top-k", self.top_k), ("--min-p", self.min_p)) if v]
            if given:
                raise MisuseError(f"{given[0]} goes with draws, and --temperature 0 takes the most likely token")
        if "" in self.stop:
            raise MisuseError("--stop: expected a text, found an empty one")

    def _check_prompts(self) -> None:
        columns = {
            "--prompt-column": self.prompt_column,
            "--messages-column": self.messages_column,
            "--prefix-tokens": self.prefix_tokens,
        }
        named = [flag for flag, value in columns.items() if value is not None]
        if len(named) > 1:
            raise MisuseError(f"one kind of prompt at a time: found {' and '.join(named)}")
        if self.template is None:
            if self.dataset is None:
                raise MisuseError("missing --dataset, the prompts; or --template, which makes them of labels")
            if self.label or self.shots or self.num_examples is not None:
                raise MisuseError("--label, --num-examples and --shots go with --template")
            if self.text_column is not None and self.prefix_tokens is None:
                raise MisuseError(
                    "--text-column goes with --prefix-tokens, the length of a prompt; whole texts as prompts are given with "
                    "--prompt-column"
                )
            if self.as_chat and (self.messages_column is not None or self.prefix_tokens is not None):
                raise MisuseError(
                    "--as-chat goes with --prompt-column or --template: a prompt that is a text of its own"
                )
        else:
            if named or self.keep_column:
                raise MisuseError(f"--template makes the prompts itself; drop {(*named, '--keep-column')[0]}")
            if self.num_examples is None:
                raise MisuseError("--template needs --num-examples: how many examples to ask for, over all labels")
            if self.dataset is None and not self.label:
                raise MisuseError("--template needs the labels: --label for each, or a --dataset with a label column")
            if self.shots < 0:
                raise MisuseError(f"--shots: expected at least 0, found {self.shots}")
            if self.shots and self.dataset is None:
                raise MisuseError("--shots needs --dataset: the labelled rows to show")
            if self.rows is not None:
                raise MisuseError("--rows goes with prompts; --template makes --num-examples of them")
            if len(set(self.label)) < len(self.label):
                raise MisuseError(f"--label: expected each label once, found {', '.join(self.label)}")
        chat_template_kwargs(self.chat_template_kwargs)

    @property
    def dropped(self) -> tuple[Fault, ...]:
        """The faults to drop, in the order of `FAULTS`.

        Without `--drop`: all for labelled examples (`--template`), none for prompts.
        """
        if not self.drop:
            return () if self.template is None else FAULTS
        return tuple(fault for fault in FAULTS if fault in self.drop)

    @property
    def uses_devices(self) -> bool:
        """Whether the model runs in the workers (on GPUs if available), not on a server."""
        return not self.server

    @property
    def row_range(self) -> tuple[int, int | None] | None:
        """The parsed value of `--rows`; see `parse_rows`."""
        return parse_rows(self.rows)

    @property
    def parsed_part(self) -> tuple[int, int] | None:
        """The parsed value of `--part`: I and N; None: not given."""
        return parse_part(self.part)

    def data(self, **columns: str | None) -> DataConfig:
        """The data set of prompts, with the given columns."""
        assert self.dataset is not None
        return DataConfig(
            dataset=self.dataset,
            data_files=self.data_files,
            dataset_config=self.dataset_config,
            dataset_revision=self.dataset_revision,
            split=self.split,
            **{name: value for name, value in columns.items() if value is not None},  # type: ignore[arg-type]
        )
