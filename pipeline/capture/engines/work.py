"""The protocol of work that engines schedule shard by shard: a capture or a generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from pipeline.cache.format.manifest import AnyPlan, Layout
from pipeline.config import CacheLogitsConfig, GenerateConfig
from pipeline.records import Receipt, ShardPlan

#: The configuration of a command contains the settings of its engine.
Config = CacheLogitsConfig | GenerateConfig


class AnyJob(Protocol):
    """All inputs of a worker except its shards; the same in every worker."""

    @property
    def layout(self) -> Layout:
        """The output of the work."""

    @property
    def plan(self) -> AnyPlan:
        """The plan with all shards."""


class Work(Protocol):
    """Work whose shards any worker can make, in any order and repeatedly, with identical bytes.

    The process that distributes the shards only reads the plan and the receipts. The workers build
    the job and load its model. Implementations have no state, because they are pickled for the
    workers.
    """

    @property
    def command(self) -> str:
        """Name of the command, for progress messages."""

    @property
    def speaks(self) -> tuple[str, ...]:
        """Names of the loggers whose info messages only the first worker prints."""

    def open_layout(self, config: Any) -> Layout:
        """Open the output."""

    def prepare(self, config: Any) -> Any:
        """Build the job, and start or join its output."""

    def after_the_first(self, config: Any) -> Any:
        """Return the configuration of all workers but the first, which does the one-time steps."""

    def current_plan(self, layout: Layout) -> AnyPlan | None:
        """Return the plan of the output, if there is one."""

    def outstanding(self, layout: Layout, plan: Any, part: tuple[int, int] | None) -> list[ShardPlan]:
        """Return the shards of a part that are missing."""

    def is_finished(self, layout: Layout, plan: Any) -> bool:
        """Return whether the complete output is committed."""

    def opened(self, layout: Layout) -> Any:
        """Open the finished output."""

    def finish(self, layout: Layout, plan: Any) -> Any:
        """Commit and return the output if no shard is missing, else return None."""

    def show(self, job: Any, waiting: Sequence[ShardPlan]) -> None:
        """Log information before the first shard; called once, in one process."""

    def check_rows(self, job: Any, waiting: Sequence[ShardPlan]) -> None:
        """Check the rows before the first shard; called once, in one process."""

    def check(self, job: Any) -> None:
        """Check the model; called in each process that loads it."""

    def make(
        self,
        job: Any,
        shards: Iterable[ShardPlan],
        done: Callable[[Receipt], None],
        moved: Callable[[int, int], None],
    ) -> None:
        """Make shards one after another.

        Args:
            done: called with each receipt.
            moved: called after each batch with its source rows and tokens.
        """
