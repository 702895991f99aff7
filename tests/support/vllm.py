"""A real vLLM server on loopback, run from a separate environment (make test-vllm)."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

#: Names the directory of the environment that `make test-vllm` creates.
VARIABLE = "SOFTLABEL_VLLM"
_SECONDS_TO_START = 600


def program() -> Path | None:
    """Return the path of the environment's `vllm`, or None if it is missing."""
    folder = os.environ.get(VARIABLE)
    path = Path(folder, "bin", "vllm") if folder else None
    return path if path is not None and path.is_file() else None


@contextmanager
def serving(model: Path, log: Path, *flags: str) -> Iterator[str]:
    """Serve a model directory while the block runs, and yield the server's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(program()), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *flags]
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")},
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)
    url = f"http://127.0.0.1:{port}"
    try:
        stop = time.monotonic() + _SECONDS_TO_START
        while True:
            if process.poll() is not None or time.monotonic() > stop:
                raise RuntimeError(f"vLLM has not started:\n{log.read_text()[-4000:]}")
            try:
                if httpx2.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(1)
        yield f"{url}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
