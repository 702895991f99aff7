"""Processes for tests, forked from a server that has loaded torch, transformers and this project.

A new interpreter imports for four seconds before it runs anything. A fork of a warm one starts in
20 milliseconds and is still a separate process, with its own exit code, standard output and error,
environment and signals. Properties that a fork cannot show, such as the modules that a command
imports, are tested with `subprocess`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

_LOADED = ["tests.support.tiny", "tests.support.preloaded", "tests.support.processes"]


@cache
def _server() -> ForkServerContext:
    """Return the context of the fork server, which runs until this process ends.

    `datasets` writes to a separate folder in its forks.
    """
    home = tempfile.mkdtemp(prefix="hf-home-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    before = dict(os.environ)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ.update(HF_HOME=home, OMP_NUM_THREADS="1", PYTHONPATH=path)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


class Running:
    """A started process whose output goes to two files."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path | None) -> None:
        self.arguments = list(arguments)
        self.folder = Path(tempfile.mkdtemp(prefix="process-"))
        files = (str(self.folder / "out"), str(self.folder / "err"))
        self.process = _server().Process(
            target=_become, args=(self.arguments, dict(environment), str(cwd or Path.cwd()), *files)
        )
        self.process.start()

    def wait(self) -> CompletedProcess[str]:
        """Wait for the process; return its output and exit code (negative for a signal)."""
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        self.process.close()
        out, err = ((self.folder / name).read_text(errors="replace") for name in ("out", "err"))
        shutil.rmtree(self.folder)
        return CompletedProcess(self.arguments, code, out, err)


def start(*arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Running:
    """Start `python ARGUMENTS`: `-c CODE`, `-m MODULE` or a file, each with its arguments.

    Args:
        env: variables to set in addition to those of this process. Variables that libraries read on
            import (HF_HOME, OMP_NUM_THREADS) are fixed already.
        cwd: the working directory; None: this process's.
    """
    return Running(arguments, {**os.environ, **(env or {})}, cwd)


def python(*arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> CompletedProcess[str]:
    """Run `python ARGUMENTS` to completion, like `subprocess.run` with captured text."""
    return start(*arguments, env=env, cwd=cwd).wait()


def ranks(count: int, *arguments: str, env: Mapping[str, str] | None = None) -> list[CompletedProcess[str]]:
    """Run `python ARGUMENTS` as several ranks on one machine, with torchrun's environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        **(env or {}),
    }
    running = [start(*arguments, env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(count)]
    return [process.wait() for process in running]


def torchrun(count: int, *arguments: str, env: Mapping[str, str] | None = None) -> CompletedProcess[str]:
    """Run `torchrun --standalone --nproc_per_node COUNT ARGUMENTS`.

    This is torch's own launcher; its ranks are forks of it.
    """
    return start(_TORCHRUN, str(count), *arguments, env=env).wait()


#: First argument in the place of `-c` or `-m`.
_TORCHRUN = "torchrun"


def _launch(count: int, arguments: list[str]) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, _run)(arguments)


def _become(arguments: list[str], environment: dict[str, str], cwd: str, out: str, err: str) -> None:
    """Turn this fork into the process that `python ARGUMENTS` would start."""
    for path, target in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, target)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    multiprocessing.set_start_method(None, force=True)  # the fork inherits the server's start method otherwise
    tempfile.tempdir = None  # recomputed from TMPDIR
    try:
        if arguments[0] == _TORCHRUN:
            _launch(int(arguments[1]), arguments[2:])
        else:
            _run(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _run(arguments: list[str]) -> None:
    how, rest = arguments[0], arguments[1:]
    if how == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    elif how == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(how, run_name="__main__")


class ForkedWorkers:
    """Multiprocessing context that starts capture workers as forks instead of new interpreters."""

    def Pipe(self) -> Any:  # noqa: N802 - as multiprocessing's
        return _server().Pipe()

    def Process(self, *, target: Callable[..., None], args: tuple[Any, ...], **settings: Any) -> Any:  # noqa: N802
        """Return a fork that gets the current environment, as a new interpreter would."""
        return _server().Process(target=_work, args=(dict(os.environ), target, args), **settings)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the workers of a capture as forks of the server."""
    monkeypatch.setattr("pipeline.capture.engines.workers._SPAWN", ForkedWorkers())


def _work(environment: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)
