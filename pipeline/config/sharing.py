"""Configurations of push and pull."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.config.options import data_option, output_option
from pipeline.errors import MisuseError


@dataclass(frozen=True, slots=True, kw_only=True)
class PushConfig:
    """Publish a cache to the Hugging Face hub, an S3-compatible store, or another URL."""

    cache: str = data_option("Directory of the cache.")
    to: str = output_option("hf://datasets/ORG/NAME, s3://BUCKET/PATH, or another URL.")
    license: str | None = output_option(
        "Licence of the data, as the hub names it: apache-2.0, cc-by-4.0, ... Required.", None
    )
    public: bool = output_option(
        "The hub: a repository that everyone can read. Without it, only you and your organisation.", False
    )
    revision: str | None = output_option("The hub: branch to push to. Default: main.", None)
    json: bool = output_option("Print JSON.", False)

    def __post_init__(self) -> None:
        if self.license is None or not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", self.license):
            found = "none" if self.license is None else repr(self.license)
            raise MisuseError(
                f"--license: expected the licence of the data, as apache-2.0 or cc-by-4.0 (other: another one), found {found}; those who use it need to know"
            )
        if "://" not in self.to:
            raise MisuseError(f"--to: expected a URL, as hf://datasets/ORG/NAME or s3://BUCKET/PATH, found {self.to!r}")
        if not self.to.startswith("hf://") and (self.public or self.revision is not None):
            raise MisuseError(
                "--public and --revision go with --to hf://datasets/ORG/NAME; other stores have rules of their own"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PullConfig:
    """Fetch a cache, or a part of it, and verify it."""

    from_: str = data_option(
        "URL of the cache: hf://datasets/ORG/NAME[@REVISION], s3://BUCKET/PATH, another URL, or a directory."
    )
    output: str = output_option("Directory of the copy.")
    split: tuple[str, ...] = data_option("Split to fetch; repeat for several. Default: all.", ())
    shards: tuple[str, ...] = data_option(
        "How many shards of each split to fetch, from the first; or the name of one, repeat for several. Default: all.",
        (),
    )
    json: bool = output_option("Print JSON.", False)

    def __post_init__(self) -> None:
        numbers = [part for part in self.shards if part.isdigit()]
        if numbers and (len(self.shards) > 1 or int(numbers[0]) < 1):
            raise MisuseError(
                f"--shards: expected one number of at least 1, or names of shards, found {', '.join(self.shards)}"
            )
