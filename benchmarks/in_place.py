"""Measure the bytes and memory that a capture of a large Parquet file on a web server takes.

    make bench-in-place         (or: python -m benchmarks.in_place)

The same text is served from loopback as a file of 20 MB and as a file of 2 GB. A capture with a
tiny teacher is stopped after a fixed number of shards. The results are the bytes fetched until the
first receipt, the peak memory until the last one, and how often each row group was fetched, with
one process and with two workers. `--megabytes` sets another size.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import psutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

#: Size of the source files; a shard is one row group.
ROWS_PER_GROUP, BYTES_PER_ROW = 250, 2000
SHARDS = 12


@dataclass(slots=True)
class Fetched:
    """Bytes and ranges that were requested from the server."""

    path: Path
    total: int = 0
    ranges: Counter[tuple[int, int]] = field(default_factory=Counter)


@contextmanager
def serve(path: Path) -> Iterator[tuple[str, Fetched]]:
    """Serve byte ranges of one file on loopback."""
    found, lock, size = Fetched(path), threading.Lock(), path.stat().st_size

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            return

        def _answer(self) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            start, stop = (int(asked[1]), min(size, int(asked[2] or size - 1) + 1)) if asked else (0, size)
            self.send_response(206 if asked else 200)
            for name, value in {
                "Content-Length": str(stop - start),
                "Accept-Ranges": "bytes",
                "Content-Range": f"bytes {start}-{stop - 1}/{size}",
                "ETag": '"1"',
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                with lock:
                    found.total += stop - start
                    found.ranges[start, stop] += 1
                with path.open("rb") as handle:
                    handle.seek(start)
                    self.wfile.write(handle.read(stop - start))

        do_GET = do_HEAD = _answer  # noqa: N815 - as http.server calls them

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/{path.name}", found
    finally:
        server.shutdown()
        server.server_close()


def make_source(path: Path, megabytes: int) -> None:
    """Write incompressible rows of random words with a second column that is never read."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    schema = pa.schema({"text": pa.string(), "unread": pa.binary()})
    groups = megabytes * 1_000_000 // (2 * BYTES_PER_ROW * ROWS_PER_GROUP)
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=False) as writer:
        for _ in range(groups):
            numbers = random.integers(0, 26, size=(ROWS_PER_GROUP, BYTES_PER_ROW), dtype=np.uint8) + 97
            numbers[:, ::6] = 32
            texts = [row.tobytes().decode() for row in numbers]
            unread = [random.bytes(BYTES_PER_ROW) for _ in range(ROWS_PER_GROUP)]
            writer.write_table(pa.table({"text": texts, "unread": unread}, schema=schema))


def make_teacher(folder: Path) -> None:
    """Save a language model of one small layer, to which nearly every word is an unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    vocabulary = {chr(97 + i): i for i in range(26)} | {" ": 26, "<eos>": 27}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=28, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, eos_token_id=27
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True, slots=True)
class Run:
    """Result of one capture that was stopped."""

    until_first: int
    """Bytes fetched until the first receipt."""
    peak: int
    """Peak memory (PSS) of the command and its workers until the last shard, in bytes."""
    twice: int
    """Row groups that were fetched more than once, except for the first: it is read before the
    workers start."""


def capture(url: str, fetched: Fetched, teacher: Path, output: Path, workers: int) -> Run:
    """Run `softlabel cache-logits` until it has written `SHARDS` shards."""
    command = [
        *(sys.executable, "-m", "pipeline", "cache-logits", "--task", "causal-lm", "--teacher", str(teacher)),
        *("--dataset", url, "--output", str(output), "--max-length", "512", "--rows-per-shard", str(ROWS_PER_GROUP)),
        *(("--num-workers", str(workers)) if workers > 1 else ()),
    ]
    until_first = peak = 0
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        while process.poll() is None:
            made = len(list((output / "receipts").glob("train-*.json")))
            if made and not until_first:
                until_first = fetched.total
            peak = max(peak, _memory(process.pid))
            if made >= SHARDS:
                break
            time.sleep(0.05)
    finally:
        process.terminate()
        _, said = process.communicate()
    if not until_first:
        raise click.ClickException(said.decode())
    footer = max(start for start, _ in fetched.ranges)
    groups = Counter({start: times for (start, stop), times in fetched.ranges.items() if stop <= footer and start > 4})
    return Run(until_first, peak, sum(times > 1 for times in groups.values()))


def _memory(pid: int) -> int:
    total = 0
    try:
        main = psutil.Process(pid)
        for each in (main, *main.children(recursive=True)):
            total += each.memory_full_info().pss
    except psutil.Error:
        pass
    return total


@click.command()
@click.option("--megabytes", default=2000, show_default=True, help="Size of the large source.")
def main(megabytes: int) -> None:
    """Print the fetched bytes and the memory of a capture from a small source and a large one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_teacher(folder / "teacher")
        sizes = (20, megabytes)
        for size in sizes:
            make_source(folder / f"{size}.parquet", size)
        print(
            f"{'source':>10}{'workers':>9}{'until the first shard':>23}{'share':>8}{'peak memory':>13}{'fetched twice':>15}"
        )
        missed, peaks = False, {}
        for workers in (1, 2):
            for size in sizes:
                with serve(folder / f"{size}.parquet") as (url, fetched):
                    run = capture(url, fetched, folder / "teacher", folder / f"cache-{size}-{workers}", workers)
                share = run.until_first / (folder / f"{size}.parquet").stat().st_size
                peaks[size, workers] = run.peak
                print(
                    f"{size:>7} MB{workers:>9}{run.until_first / 1e6:>20.1f} MB{share:>8.2%}{run.peak / 1e6:>10.0f} MB{run.twice:>15}"
                )
                missed |= run.twice > 0 or (size == megabytes and share >= 0.01)
            ratio = peaks[megabytes, workers] / peaks[20, workers]
            print(f"peak memory, {megabytes} MB over 20 MB, {workers} worker(s): {ratio:.2f}x")
            missed |= ratio > 1.1
        raise SystemExit(int(missed))


if __name__ == "__main__":
    main()
