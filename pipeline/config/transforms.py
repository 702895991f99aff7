"""Configurations of merge, filter and convert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.options import data_option, encoding_option, output_option
from pipeline.errors import MisuseError


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeConfig:
    """Join caches of one contract; rows of equal content are kept once."""

    cache: tuple[str, ...] = data_option("Directory of a cache; repeat for two or more.")
    output: str = output_option("Directory of the merged cache.")
    overwrite: bool = output_option("Delete the cache that the output directory holds, and start again.", False)

    def __post_init__(self) -> None:
        if len(self.cache) < 2:
            raise MisuseError("--cache: expected two or more, repeat it")


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterConfig:
    """Keep some rows of a cache: by a condition in SQL over its columns, by split, or both."""

    cache: str = data_option("Directory of the cache.")
    output: str = output_option("Directory of the new cache.")
    where: str | None = data_option(
        "Condition in DuckDB's SQL over the columns of one row, as \"len(input_ids) > 128 and domain = 'news'\".", None
    )
    split: tuple[str, ...] = data_option("Split to keep; repeat for several. Default: all.", ())
    as_split: str | None = output_option("Name that the one split gets in the new cache.", None)
    overwrite: bool = output_option("Delete the cache that the output directory holds, and start again.", False)

    def __post_init__(self) -> None:
        if self.where is None and not self.split and self.as_split is None:
            raise MisuseError("give --where, --split or --as-split: what is to be kept")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig:
    """Write the rows of a cache in a smaller encoding, exact or unbiased as a capture in it."""

    cache: str = data_option("Directory of the cache.")
    output: str = output_option("Directory of the new cache.")
    encoding: Literal["top-k", "top-p", "sampled"] = encoding_option("How the soft labels are to be kept.")
    top_k: int | None = encoding_option("Classes to keep (top-k).", None)
    top_p: float | None = encoding_option("Mass to keep (top-p).", None)
    sample_size: float | None = encoding_option(
        "c: classes of at least 1/c are kept exactly, others sampled (sampled).", None
    )
    temperature: tuple[float, ...] = encoding_option(
        "Temperature to serve; repeat for a grid (top-k, top-p). Default: those of the cache, or of a capture.", ()
    )
    overwrite: bool = output_option("Delete the cache that the output directory holds, and start again.", False)

    def __post_init__(self) -> None:
        knobs = {"top-k": self.top_k, "top-p": self.top_p, "sampled": self.sample_size}
        for kind, value in knobs.items():
            if kind != self.encoding and value is not None:
                raise MisuseError(f"--encoding {self.encoding} does not go with the knob of {kind}, {value}")
