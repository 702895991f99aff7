"""A stand-in for vLLM and SGLang on loopback.

Serves both APIs with a tiny model's real logits, and injects faults.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

#: Maps an answer to another answer, a status, or None to close the connection.
Fault = Callable[[dict[str, Any]], "dict[str, Any] | bytes | int | None"]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close the connection."""


@dataclass
class StandIn:
    """A server of one model; its fields may be changed while it runs."""

    logprobs: Callable[[list[int]], np.ndarray]
    """Prompt of n tokens -> (n, V) log-probabilities, float32."""
    api: str = "vllm"
    model: str = "tiny"
    version: str = "0.32.0"
    root: str | None = None
    """Path or name that vLLM reports for its weights."""
    longest: int = 4096
    most_logprobs: int = 400
    latency: float = 0.0
    key: str | None = None
    most_at_once: int = 1 << 30
    """Concurrent requests above this number are refused with 429."""
    faults: list[Fault] = field(default_factory=list)
    """Faults, each applied to one request in order; later requests are answered correctly."""
    fault_every: int = 1
    """Requests per fault."""
    most_faults: int = 1 << 30
    """Maximum faults per prompt, since a row that keeps failing ends the capture."""
    faulted: Counter[tuple[int, ...]] = field(default_factory=Counter)
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answered: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """Prompts that were answered without a fault."""
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    server: _Server | None = None
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Start the server, on its previous port if it was stopped."""
        self.server = _Server(("127.0.0.1", self.port), _handler(self))
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        with self.lock:
            server, self.server = self.server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def get(self, path: str) -> Any:
        if path == "/v1/models":
            entry = {"id": self.model, "object": "model", "owned_by": self.api, "max_model_len": self.longest}
            if self.root is not None:
                entry["root"] = self.root
            return {"object": "list", "data": [entry]}
        if path == "/version" and self.api == "vllm":
            return {"version": self.version}
        if path == "/get_server_info" and self.api == "sglang":
            return {"version": self.version, "model_path": "/models/tiny", "dtype": "float32", "quantization": None}
        return None

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | int:
        if path == "/v1/completions" and self.api == "vllm":
            return self._vllm(body)
        return self._sglang(body) if path == "/generate" and self.api == "sglang" else 404

    def _vllm(self, body: dict[str, Any]) -> dict[str, Any] | int:
        ids, k = body["prompt"], body["prompt_logprobs"]
        assert body["model"] == self.model
        assert body["max_tokens"] == 1
        if k > self.most_logprobs:
            raise _RefusedError(
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.most_logprobs}"
            )
        if len(ids) + 1 > self.longest:
            raise _RefusedError(f"This model's maximum context length is {self.longest} tokens")
        table = self.logprobs(ids)
        entries: list[Any] = [None]
        for j in range(1, len(ids)):
            row = table[j - 1]
            top = np.argsort(-row, kind="stable")[:k].tolist()
            rank = int((row >= row[ids[j]]).sum())
            entry = {str(ids[j]): {"logprob": float(row[ids[j]]), "rank": rank, "decoded_token": "x"}}
            for place, token in enumerate(top, start=1):
                entry.setdefault(str(token), {"logprob": float(row[token]), "rank": place, "decoded_token": "x"})
            entries.append(entry)
        choice = {
            "index": 0,
            "text": "x",
            "finish_reason": "length",
            "prompt_logprobs": entries,
            "prompt_token_ids": ids,
        }
        return {"id": "cmpl-1", "choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": 1}}

    def _sglang(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, k, start = body["input_ids"], body["top_logprobs_num"], body["logprob_start_len"]
        assert body["return_logprob"] is True
        table = self.logprobs(ids)
        tokens: list[Any] = [[None, ids[start], None]]
        tops: list[Any] = [None]
        for j in range(start + 1, len(ids)):
            row = table[j - 1]
            top = np.argsort(-row, kind="stable")[:k].tolist()
            tokens.append([float(row[ids[j]]), ids[j], None])
            tops.append([[float(row[token]), token, None] for token in top])
        about = {"prompt_tokens": len(ids), "input_token_logprobs": tokens, "input_top_logprobs": tops}
        return {"text": "x", "meta_info": {"id": "1", "completion_tokens": 1, **about}}


class _RefusedError(Exception):
    """A request that is answered with status 400."""


def _handler(stand_in: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: object) -> None:
            return

        def do_GET(self) -> None:
            if self._may():
                found = stand_in.get(self.path)
                self._send(404 if found is None else 200, found or {"detail": "Not Found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._may():
                return
            with stand_in.lock:
                stand_in.asked.append(body)
                stand_in.headers.append(dict(self.headers))
                stand_in.in_flight += 1
                stand_in.most_in_flight = max(stand_in.most_in_flight, stand_in.in_flight)
                crowded = stand_in.in_flight > stand_in.most_at_once
                prompt = tuple(body.get("prompt") or body.get("input_ids") or ())
                due = len(stand_in.asked) % stand_in.fault_every == 0 and not crowded
                due &= stand_in.faulted[prompt] < stand_in.most_faults
                fault = stand_in.faults.pop(0) if stand_in.faults and due else None
                stand_in.faulted[prompt] += fault is not None
            try:
                time.sleep(stand_in.latency)
                if crowded:
                    self._send(429, {"error": {"message": "too many requests"}})
                    return
                try:
                    answer = stand_in.post(self.path, body)
                except _RefusedError as error:
                    self._send(400, {"error": {"message": str(error), "type": "BadRequestError"}})
                    return
                found = answer if fault is None or isinstance(answer, int) else fault(answer)
                if found is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                elif isinstance(found, int):
                    self._send(found, {"error": {"message": "an injected fault"}})
                else:
                    self._send(200, found)
                    if fault is None:
                        with stand_in.lock:
                            stand_in.answered[prompt] += 1
            finally:
                with stand_in.lock:
                    stand_in.in_flight -= 1

        def _may(self) -> bool:
            if stand_in.key is None or self.headers.get("Authorization") == f"Bearer {stand_in.key}":
                return True
            self._send(401, {"error": "Unauthorized"})
            return False

        def _send(self, status: int, content: Any) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def logprobs_of(model: Any) -> Callable[[list[int]], np.ndarray]:
    """Return a function that computes a model's log-probabilities, once for each prompt."""
    import torch

    lock, known = threading.Lock(), {}

    def found(ids: list[int]) -> np.ndarray:
        key = tuple(ids)
        with lock:
            if key not in known:
                with torch.inference_mode():
                    logits = model(input_ids=torch.tensor([ids])).logits[0]
                known[key] = torch.log_softmax(logits.float(), -1).numpy()
            return known[key]

    return found


@contextmanager
def serving(model: Any, **settings: Any) -> Iterator[StandIn]:
    """Serve a model while the block runs."""
    stand_in = StandIn(logprobs_of(model), **settings)
    stand_in.start()
    try:
        yield stand_in
    finally:
        stand_in.stop()
