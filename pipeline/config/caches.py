"""Configurations of verify, audit, inspect and import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.options import (
    cache_bytes_option,
    cache_dir_option,
    check_positive,
    data_option,
    encoding_option,
    machine_option,
    model_option,
    output_option,
    parse_bytes,
)
from pipeline.errors import MisuseError


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyConfig:
    """Check every byte of a cache against its manifest."""

    cache: str = data_option("Directory of the cache.")
    quick: bool = data_option("Check hashes, sizes, columns and the counts in footers; decode nothing.", False)
    repair: bool = output_option("Delete damaged shards; the same cache-logits command writes them again.", False)
    json: bool = output_option("Print JSON.", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """Run the teacher again on some rows of a cache, and compare."""

    cache: str = data_option("Directory of the cache.")
    teacher: str = model_option("Name or path of the teacher that made it.")
    teacher_revision: str | None = model_option("Revision of a teacher on the hub. Default: the manifest's.", None)
    base_model: str | None = model_option("Base model of a PEFT adapter, in place of the one that it names.", None)
    attn_implementation: str | None = machine_option(
        "Attention implementation, where this machine lacks the manifest's.", None
    )
    device_map: str | None = machine_option("Spread the teacher over devices: auto, or a device.", None)
    trust_remote_code: bool = model_option(
        "Run code that comes with the teacher. Never set by a cache or a manifest.", False
    )
    rows: int = data_option("How many rows, chosen at random.", 64)
    seed: int = data_option("Seed of the choice.", 0)
    json: bool = output_option("Print JSON.", False)

    def __post_init__(self) -> None:
        check_positive("--rows", self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectConfig:
    """Show what a cache holds."""

    cache: str = data_option("Directory or URL of the cache.")
    split: str | None = data_option("Split of the rows to show. Default: the first.", None)
    rows: int | None = output_option("How many rows to show. Default: 2, on a page 6.", None)
    tokens: int | None = output_option(
        "How many tokens of each row to show (language models). Default: 24, on a page 160.", None
    )
    top: int | None = output_option("How many soft labels to show for each position. Default: 4, on a page 6.", None)
    cache_dir: str | None = cache_dir_option()
    cache_bytes: str = cache_bytes_option()
    json: bool = output_option("Print the contract, totals and shard table as JSON.", False)
    html: str | None = output_option("Write a page of it, to be opened in a browser, to this file.", None)

    def __post_init__(self) -> None:
        if self.json and self.html is not None:
            raise MisuseError("--html writes a page and --json prints: use one of them")
        parse_bytes("--cache-bytes", self.cache_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportConfig:
    """Make a cache from server responses, or from a data set of top log-probabilities."""

    input: tuple[str, ...] = data_option(
        "JSON-lines file with one response or row a line, Parquet file, or directory of Parquet files; repeat for several."
    )
    output: str = output_option("Directory of the cache.")
    tokenizer: str = model_option("Name or path of the teacher's tokenizer.")
    teacher: str = model_option("Name of the teacher, for the manifest.")
    top_k: int | None = encoding_option(
        "Log-probabilities to keep of each position. Default: 20 of a response, all of a row of a table.", None
    )
    store_label_logprobs: bool = encoding_option(
        "Store the teacher's log-probability of each token that follows too (2 bytes a position); a row where it is not known is a bad row.",
        False,
    )
    split: str = data_option("Split that the rows become.", "train")
    position_zero: Literal["auto", "empty", "filled"] = data_option(
        "Whether entry i is of token i, so that the first is empty (vLLM, OpenAI), or of token i + 1; auto: detected.",
        "auto",
    )
    compression_config: str | None = data_option(
        "DistillKit's compression configuration of the Parquet files. Default: compression_config.yaml beside the first file.",
        None,
    )
    max_length: int | None = data_option(
        "Longest row in tokens that is allowed. Default: the longest that comes.", None
    )
    requests: str | None = data_option(
        "Input file of a batch (custom_id and body a line), where the answers do not hold their prompts.", None
    )
    on_bad_row: Literal["stop", "skip"] = data_option(
        "What to do with a failed request, or with a row that cannot be used.", "stop"
    )
    overwrite: bool = output_option("Delete what the output directory holds, and start again.", False)

    def __post_init__(self) -> None:
        check_positive("--top-k", self.top_k)
        if not self.input:
            raise MisuseError("--input: expected at least one file")
