"""What engines schedule: work that is done shard by shard, a capture or another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from pipeline.cache.format.manifest import AnyPlan, Layout
from pipeline.config import CacheLogitsConfig, GenerateConfig
from pipeline.records import Receipt, ShardPlan

#: The settings of engines stand in the configuration of the command.
Config = CacheLogitsConfig | GenerateConfig


class AnyJob(Protocol):
    """What a worker needs beside its shards, the same in every worker."""

    @property
    def layout(self) -> Layout:
        """Where the shards go."""

    @property
    def plan(self) -> AnyPlan:
        """The shards."""


class Work(Protocol):
    """A kind of work whose shards any worker makes, in any order, any number of times, with the same bytes.

    The process that shares the shards among workers knows the plan and the receipts alone: the job,
    with its model, is the workers'. Implementations have no state: they are sent to the workers by
    name.
    """

    @property
    def command(self) -> str:
        """As the progress names it."""

    @property
    def speaks(self) -> tuple[str, ...]:
        """Loggers whose information is that of the first worker alone."""

    def open_layout(self, config: Any) -> Layout:
        """Where the output stands."""

    def prepare(self, config: Any) -> Any:
        """The job; the output is begun, or joined."""

    def after_the_first(self, config: Any) -> Any:
        """The configuration of the workers after the first, which has done what is done once."""

    def current_plan(self, layout: Layout) -> AnyPlan | None:
        """The plan that is there."""

    def outstanding(self, layout: Layout, plan: Any, part: tuple[int, int] | None) -> list[ShardPlan]:
        """The shards of a part that are still to be made."""

    def is_finished(self, layout: Layout, plan: Any) -> bool:
        """Whether the whole is committed."""

    def opened(self, layout: Layout) -> Any:
        """What was finished before."""

    def finish(self, layout: Layout, plan: Any) -> Any:
        """Commit, where no shard is missing; None where others are still to make some."""

    def show(self, job: Any, waiting: Sequence[ShardPlan]) -> None:
        """What is said before the first shard: once, by one process."""

    def check_rows(self, job: Any, waiting: Sequence[ShardPlan]) -> None:
        """The checks of the rows before the first shard: once, by one process."""

    def check(self, job: Any) -> None:
        """The checks of the model: by each process that has one."""

    def make(
        self,
        job: Any,
        shards: Iterable[ShardPlan],
        done: Callable[[Receipt], None],
        moved: Callable[[int, int], None],
    ) -> None:
        """Make shards one after another; `done` gets each receipt, `moved` source rows and tokens after each batch."""
