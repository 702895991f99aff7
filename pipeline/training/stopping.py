"""On SIGTERM during training, save a complete checkpoint before the process ends."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import TrainerCallback

from pipeline.models.arguments import num_ranks

logger = logging.getLogger(__name__)

#: Seconds to wait for the end of a step; SLURM kills a process 30 seconds after SIGTERM.
PATIENCE = 25.0


class CheckpointOnSigterm(TrainerCallback):
    """A callback and context manager around `trainer.train()` that handles SIGTERM.

    The first SIGTERM saves a checkpoint at the end of the step and then ends the process. A second
    SIGTERM, or a step that does not end within `PATIENCE` seconds, ends the process at once.

    Under torchrun the signal reaches the ranks at different times, so they agree at the end of each
    step. A repeated signal is ignored there: the launcher forwards the signal that SLURM has
    already sent to every process.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.asked = self._late = self._saving = False
        self._several = num_ranks() > 1
        self._before: Any = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            self._before = signal.signal(signal.SIGTERM, self._ask) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if kind is None and self.asked:  # the signal came after the last step
            self._end()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request a checkpoint if any rank has received SIGTERM."""
        if not self._agreed(args.device):
            return
        if self._timer is not None:
            self._timer.cancel()
        if control.should_evaluate:
            logger.warning("%s: SIGTERM: the evaluation after step %d is left out", self.output, state.global_step)
        control.should_evaluate = False  # it may take longer than the remaining time
        control.should_save = self._saving = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the process once the checkpoint is complete on all ranks."""
        if not self._saving:
            return
        if self._several and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            logger.info("%s: SIGTERM: saved checkpoint-%d", self.output, state.global_step)
        self._end()

    def _ask(self, _number: int, _frame: Any) -> None:
        if not self.asked:
            self.asked = True
            self._timer = threading.Timer(PATIENCE, self._expire)
            self._timer.daemon = True
            self._timer.start()
        elif self._late or not self._several:
            self._end()

    def _expire(self) -> None:
        self._late = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _agreed(self, device: torch.device) -> bool:
        if not (self._several and torch.distributed.is_initialized()):
            return self.asked
        asked = torch.tensor(int(self.asked), device=device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked.item())

    def _restore(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _end(self) -> None:
        self._restore()
        signal.raise_signal(signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM)  # a handler of the caller may return
