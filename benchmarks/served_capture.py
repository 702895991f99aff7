"""Compare a capture from a server with the same requests without a cache.

    make bench-served           (or: python -m benchmarks.served_capture)

A stand-in for vLLM on loopback, in its own process, answers every prompt after 5 ms with
precomputed log-probabilities. *Bare*: the client sends the rows of the capture and parses the
answers, nothing else. *Capture*: `cache-logits --server`, from the tokens to the committed cache.
The two alternate, and the results are medians over the repeats. The output also shows the processor
time of this process, which depends less on other load on the machine than the throughput does.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import socket
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VOCABULARY, TOP_K = 8_192, 20
#: Number of precomputed answers. Prompts use them in turn, with added entries of their own tokens.
_ANSWERS = 8
_ROWS_PER_SHARD = 100


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def serve(listener: socket.socket, latency: float, length: int) -> None:
    """Answer requests until the process ends."""
    draw = random.Random(0)
    texts = [[_entries(draw) for _ in range(length)] for _ in range(_ANSWERS)]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: object) -> None:
            return

        def do_GET(self) -> None:
            about = {"id": "stand-in", "owned_by": "vllm", "max_model_len": 4096}
            self._send(json.dumps({"data": [about], "version": "0"}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            due = time.perf_counter() + latency
            ids, text = body["prompt"], texts[sum(body["prompt"][:4]) % _ANSWERS]
            entries = ",".join(f'{{"{i}":{{"logprob":-7.5,"rank":90}},{text[j]}}}' for j, i in enumerate(ids[1:]))
            time.sleep(max(0.0, due - time.perf_counter()))
            self._send(f'{{"choices":[{{"prompt_logprobs":[null,{entries}],"prompt_token_ids":{ids}}}]}}')

        def _send(self, text: str) -> None:
            data = text.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = _Server(listener.getsockname(), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.serve_forever()


def _entries(draw: random.Random) -> str:
    """Return the top entries of one position as JSON.

    Their ids are from the half of the vocabulary that prompts do not use.
    """
    ids = draw.sample(range(VOCABULARY // 2, VOCABULARY), TOP_K)
    weights = sorted((draw.random() ** 4 for _ in ids), reverse=True)
    total = sum(weights) / 0.95
    parts = (
        f'"{i}":{{"logprob":{math.log(w / total + 1e-9)!r},"rank":{r}}}'
        for r, (i, w) in enumerate(zip(ids, weights, strict=True), 1)
    )
    return ",".join(parts)


@contextmanager
def serving(latency: float, length: int) -> Iterator[str]:
    """Run the stand-in, and yield its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    process = multiprocessing.get_context("fork").Process(target=serve, args=(listener, latency, length), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        process.terminate()
        process.join()


def make_source(folder: Path, rows: int, length: int) -> None:
    """Write rows of random words from half the vocabulary, and the tokenizer of all of it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<eos>": VOCABULARY - 1}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", model_max_length=4096).save_pretrained(
        folder / "tokenizer"
    )
    draw = random.Random(1)
    texts = (" ".join(f"w{draw.randrange(VOCABULARY // 2)}" for _ in range(length - 1)) for _ in range(rows))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def measure(url: str, folder: Path, concurrency: int, length: int, output: Path | None) -> tuple[float, float]:
    """Measure a capture, or the bare requests.

    Args:
        output: directory of the capture; None: the bare requests.

    Returns:
        Tokens per second, and processor microseconds per token.
    """
    from pipeline.capture.engines.in_process import capture
    from pipeline.capture.job import prepare
    from pipeline.capture.reading import read_shard
    from pipeline.config import CacheLogitsConfig, DataConfig

    config = CacheLogitsConfig(
        task="causal-lm",
        data=DataConfig(dataset=str(folder / "rows.jsonl"), max_length=length),
        teacher=str(folder / "tokenizer"),
        server=(url,),
        top_k=TOP_K,
        rows_per_shard=_ROWS_PER_SHARD,
        concurrency=concurrency,
        output=str(output or folder / "bare"),
        overwrite=output is None,
    )
    job = prepare(config)
    try:
        started, used = time.perf_counter(), time.process_time()
        if output is None:
            rows = [row for shard in job.plan.shards for row in read_shard(job, shard).examples]
            started, used = time.perf_counter(), time.process_time()
            tokens = bare(job, rows)
        else:
            cache = capture(job)
            assert cache is not None
            tokens = sum(shard.tokens for shard in cache.manifest.shards)
        return tokens / (time.perf_counter() - started), 1e6 * (time.process_time() - used) / tokens
    finally:
        job.teacher.close()


def bare(job: Any, rows: list[Any]) -> int:
    """Request every row in the batches of the capture, parse the answers, and return the tokens."""
    from pipeline.capture.plan import plan_batches

    contract = job.plan.contract
    waiting: deque[Any] = deque()
    for members, length in plan_batches([row.num_tokens for row in rows], contract.batch_tokens):
        while waiting and job.teacher.busy:
            _read(waiting.popleft())
        waiting.append(job.teacher.begin([rows[i] for i in members], length, contract.encoding))
    while waiting:
        _read(waiting.popleft())
    return sum(row.num_tokens for row in rows)


def _read(asked: Any) -> None:
    for futures in asked.futures:
        for future in futures:
            future.result()


@click.command()
@click.option("--rows", default=1500, help="Rows of the source.")
@click.option("--length", default=64, help="Tokens of a row.")
@click.option("--latency", default=0.005, help="Seconds before the stand-in answers.")
@click.option("--concurrency", default=2, help="Requests in flight.")
@click.option("--repeats", default=5, help="Of each way.")
def main(rows: int, length: int, latency: float, concurrency: int, repeats: int) -> None:
    """Print the tokens per second of a capture and of bare requests, and their ratio."""
    import torch

    from pipeline.models.quiet import quiet_libraries
    from pipeline.verbosity import set_level

    quiet_libraries()
    set_level("error")
    torch.set_num_threads(1)
    with serving(latency, length) as url, tempfile.TemporaryDirectory(prefix="served-") as name:
        folder = Path(name)
        make_source(folder, rows, length)
        found: dict[str, list[float]] = {"bare": [], "capture": []}
        processor: dict[str, list[float]] = {"bare": [], "capture": []}
        for repeat in range(repeats + 1):
            for way, speeds in found.items():
                output = folder / f"cache-{repeat}" if way == "capture" else None
                speed, used = measure(url, folder, concurrency, length, output)
                if repeat:  # the first repeat is a warm-up
                    speeds.append(speed)
                    processor[way].append(used)
        ratios = [one / other for one, other in zip(found["capture"], found["bare"], strict=True)]
        click.echo(
            f"{rows:,} rows of {length} tokens, top {TOP_K}, {1000 * latency:g} ms, {concurrency} in flight, {repeats} repeats"
        )
        for way, speeds in found.items():
            click.echo(
                f"{way:<10}{statistics.median(speeds):>10,.0f} tokens a second ({min(speeds):,.0f} to {max(speeds):,.0f}), {statistics.median(processor[way]):.0f} us of processor a token"
            )
        click.echo(f"{'ratio':<10}{statistics.median(ratios):>10.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
