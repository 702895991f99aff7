"""Test caches against killed processes, flipped bits, truncated files and concurrent captures.

    make test-faults            (or: python -m benchmarks.faults)

This process acts as a fork server: it loads torch and builds a tiny teacher once, and every capture
runs in a fork. The table shows how often each fault was tried, how often the cache was in the
required state, and how often the fault was detected. The exit code is 1 if a target is missed.
`--small` tries fewer of each; `tests/faults` runs that.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROWS, PER_SHARD, CLASSES = 60, 20, 64


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table."""

    what: str
    tried: int
    good: int
    target: int | None
    """None: shown for comparison, without a target."""
    note: str = ""

    @property
    def missed(self) -> bool:
        return self.target is not None and self.good < self.target


# ------------------------------------------------------------------------------------- the captures


@dataclass(frozen=True, slots=True)
class Bench:
    """A tiny teacher, its data, and the cache that an undisturbed capture writes."""

    folder: Path
    model: Any
    tokenizer: Any
    rows: Any

    def capture(self, output: Path, *, seed: int = 0, rows: int | None = None, append: bool = False) -> None:
        """Run stage 1 in this process over all rows, or over the first `rows`."""
        import pipeline as softlabel

        softlabel.cache_logits(
            self.model,
            self.rows if rows is None else self.rows.select(range(rows)),
            output,
            task="causal-lm",
            tokenizer=self.tokenizer,
            encoding=softlabel.Sampled(6.0),
            max_length=32,
            rows_per_shard=PER_SHARD,
            batch_tokens=256,
            seed=seed,
            append=append,
        )

    @property
    def whole(self) -> Path:
        return self.folder / "whole"


def make_bench(folder: Path) -> Bench:
    """Build the state that every fork inherits."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    torch.set_num_threads(1)
    disable_progress_bars()
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(CLASSES)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w1", model_max_length=64)
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=CLASSES,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            max_position_embeddings=64,
        )
    )
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(CLASSES)}" for _ in range(rng.randint(5, 30))) for _ in range(ROWS)]
    bench = Bench(folder, model, tokenizer, Dataset.from_dict({"text": texts}))
    bench.capture(bench.whole)
    bench.capture(folder / "other", seed=1)
    return bench


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child process whose errors go to this process's standard error."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            work()
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.__stderr__, flush=True)
    finally:
        os._exit(code)


def end_of(child: int) -> int:
    """Return the exit code of a child process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def shared_files(root: Path) -> dict[str, bytes]:
    """Return every file with a final name, except receipts, which contain times."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "receipts" not in path.parts and not _is_hidden(path, root)
    }


def _is_hidden(path: Path, root: Path) -> bool:
    """Whether the path is a temporary file or lies in a temporary directory."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


# -------------------------------------------------------------------------------------------- kills


def count_points(bench: Bench) -> Counter[str]:
    """Count how often an undisturbed capture passes each crash point."""
    from pipeline.cache.storage.crash import hooked

    seen: Counter[str] = Counter()
    with hooked(lambda point: seen.update([point])):
        bench.capture(bench.folder / "counted")
    shutil.rmtree(bench.folder / "counted")
    return seen


def kills(bench: Bench, number: int, seed: int = 0) -> Iterator[Line]:
    """Kill a capture at every crash point in turn, check the files left behind, and resume."""
    from pipeline.cache import Cache
    from pipeline.cache.storage.crash import hooked

    rng = random.Random(seed)
    seen = count_points(bench)
    points = sorted(seen)
    expected = shared_files(bench.whole)
    ids = [row.example.source_row for row in Cache.open(bench.whole).dataset("train")]
    died = whole = same = rows = 0
    used = set()
    for i in range(number):
        point = points[i % len(points)]
        left = rng.randint(1, seen[point])
        root = bench.folder / f"killed-{i}"

        def killed(root: Path = root, point: str = point, left: int = left) -> None:
            with hooked(dying(point, left)):
                bench.capture(root)

        died += end_of(fork(killed)) == -signal.SIGKILL
        used.add(point)
        whole += nothing_torn(root, expected)
        resumed = end_of(fork(lambda root=root: bench.capture(root))) == 0  # type: ignore[misc]
        same += resumed and shared_files(root) == expected and not list(root.rglob(".*"))
        rows += resumed and [row.example.source_row for row in Cache.open(root).dataset("train")] == ids
        shutil.rmtree(root)
    note = f"{len(used)} points"
    yield Line("SIGKILL during a capture: the process died", number, died, number, note)
    yield Line("  no torn file under a final name", number, whole, number)
    yield Line("  resumed: no row missing or repeated", number, rows, number)
    yield Line("  resumed: every byte as undisturbed", number, same, number)


def dying(point: str, left: int) -> Callable[[str], None]:
    """Return a hook that kills the process the `left`-th time it reaches a crash point."""
    seen: Counter[str] = Counter()

    def hook(name: str) -> None:
        seen.update([name])
        if name == point and seen[name] == left:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def nothing_torn(root: Path, expected: dict[str, bytes]) -> bool:
    """Whether every visible file is complete, and a manifest exists only if all files do."""
    from pipeline.cache.format.manifest import Plan, parse
    from pipeline.records import Receipt

    for path in root.rglob("[!.]*"):
        if path.is_dir() or _is_hidden(path, root):
            continue
        if path.parent.name == "receipts":
            parse(Plan if path.name == "plan.json" else Receipt, path)
        elif path.read_bytes() != expected[str(path.relative_to(root))]:
            return False
    return not (root / "manifest.json").exists() or shared_files(root) == expected


# ------------------------------------------------------------------------------------------- damage


def damage(bench: Bench, flips: int, cuts: int, manifest_faults: int, seed: int = 1) -> Iterator[Line]:
    """Flip bits and truncate files, and check that `verify` finds the damage and names the file."""
    import pyarrow.parquet as pq

    from pipeline.cache.format.manifest import Layout, load_manifest

    rng = random.Random(seed)
    root = bench.folder / "damaged"
    shutil.copytree(bench.whole, root)
    shards = [Layout(root).shard(shard.name) for shard in load_manifest(root).shards]
    defaults = bench.folder / "defaults.parquet"
    found = reader_alone = default_found = default_same = 0
    for _ in range(flips):
        path = rng.choice(shards)
        good = path.read_bytes()
        expected = pq.read_table(path)
        pq.write_table(expected, defaults)
        plain = defaults.read_bytes()
        place, bit = rng.random(), rng.randrange(8)
        path.write_bytes(flipped(good, place, bit))
        found += names(root, path)
        reader_alone += training_reads(root, path, expected) != "other"
        path.write_bytes(good)
        defaults.write_bytes(flipped(plain, place, bit))
        said = outcome(defaults, expected)
        default_found += said == "found"
        default_same += said == "same"
    yield Line("bit flip in a shard: found, the file named", flips, found, flips)
    yield Line("  as training reads, without the hash: found, or without effect on a value", flips, reader_alone, flips)
    yield Line(
        "  default Parquet writer and reader: found, or without effect on a value",
        flips,
        default_found + default_same,
        None,
        f"{flips - default_found - default_same} silently other values",
    )
    cut = 0
    for _ in range(cuts):
        path = rng.choice(shards)
        good = path.read_bytes()
        path.write_bytes(good[: rng.randrange(len(good))])
        cut += names(root, path)
        path.write_bytes(good)
    yield Line("shard cut short: found, the file named", cuts, cut, cuts)
    manifest = root / "manifest.json"
    good = manifest.read_bytes()
    counts = {"bit flip in the manifest": 0, "manifest cut short": 0}
    for _ in range(manifest_faults):
        manifest.write_bytes(flipped(good, rng.random(), rng.randrange(8)))
        counts["bit flip in the manifest"] += names(root, manifest)
        manifest.write_bytes(good[: rng.randrange(len(good) - 1)])  # complete without its final newline
        counts["manifest cut short"] += names(root, manifest)
    manifest.write_bytes(good)
    for what, number in counts.items():
        yield Line(f"{what}: found, the file named", manifest_faults, number, manifest_faults)


def flipped(data: bytes, place: float, bit: int) -> bytes:
    """Return the bytes with one bit flipped."""
    changed = bytearray(data)
    changed[int(place * len(data))] ^= 1 << bit
    return bytes(changed)


def names(root: Path, path: Path) -> bool:
    """Whether `verify` reports exactly one problem, in this file."""
    from pipeline.cache import verify
    from pipeline.errors import PipelineError

    try:
        problems = verify(root).problems
    except PipelineError as error:
        problems = (str(error),)
    return len(problems) == 1 and problems[0].startswith(str(path))


def training_reads(root: Path, path: Path, expected: Any) -> str:
    """Return the `outcome` of reading a damaged shard with this project's reader.

    The reader checks the footer's hash, page checksums, counts and ranges.
    """
    import pyarrow as pa

    from pipeline.cache.format.contents import check_contents
    from pipeline.cache.format.manifest import load_manifest
    from pipeline.cache.reading.shards import check_shard_file, read_row_group
    from pipeline.errors import IntegrityError

    manifest = load_manifest(root)
    shard = next(shard for shard in manifest.shards if shard.name == path.stem)
    try:
        file = check_shard_file(path, shard, manifest)
        parts = [read_row_group(file, path, group) for group in range(len(shard.row_groups))]
        for part in parts:
            check_contents(part, manifest.contract, str(path))
    except IntegrityError:
        return "found"
    return "same" if pa.concat_tables(parts).equals(expected) else "other"


def outcome(path: Path, expected: Any, **settings: Any) -> str:
    """Read a damaged file with PyArrow.

    Returns:
        `found` if reading raises an error, `same` if the values are equal, `other` if they differ.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, **settings) as file:
            table = file.read()
        table.validate(full=True)
        same = table.schema.names == expected.schema.names and table.equals(expected)
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return "found"
    return "same" if same else "other"


# -------------------------------------------------------------------------------------------- races


def races(bench: Bench, number: int, seed: int = 2) -> Iterator[Line]:
    """Run two captures at once into one directory, with the same plan and with different plans."""
    rng = random.Random(seed)
    wholes = [shared_files(bench.whole), shared_files(bench.folder / "other")]
    same = [_race(bench, i, (0, 0), rng) for i in range(number)]
    yield Line(
        "two captures of one plan at once: both end well, the cache as undisturbed",
        number,
        sum(codes == (0, 0) and files == wholes[0] for codes, files in same),
        number,
    )
    differ = [_race(bench, i, (0, 1), rng) for i in range(number)]
    good = sum(sorted(codes) == [0, 1] and files == wholes[codes.index(0)] for codes, files in differ)
    won = sum(codes[0] == 0 for codes, _ in differ)
    yield Line(
        "two plans at once: one cache as undisturbed, the other told",
        number,
        good,
        number,
        f"won by the first: {won}",
    )


def _race(bench: Bench, number: int, seeds: tuple[int, int], rng: random.Random) -> tuple[tuple[int, ...], Any]:
    from pipeline.errors import ContractError

    root = bench.folder / f"race-{number}-{seeds[1]}"
    start = time.monotonic() + 0.02
    delays = [rng.random() * 0.01, rng.random() * 0.01]

    def capture(i: int) -> None:
        time.sleep(max(0.0, start + delays[i] - time.monotonic()))
        with contextlib.suppress(ContractError) if seeds[0] != seeds[1] else contextlib.nullcontext():
            bench.capture(root, seed=seeds[i])
            return
        os._exit(1)  # reported as an error of one line

    children = [fork(lambda i=i: capture(i)) for i in range(2)]  # type: ignore[misc]
    codes = tuple(end_of(child) for child in children)
    files = shared_files(root)
    shutil.rmtree(root)
    return codes, files


# ------------------------------------------------------------------------------------------- report


def run(*, small: bool) -> list[Line]:
    """Try every fault in a temporary directory."""
    from pipeline.models.quiet import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = make_bench(Path(folder))
        return [
            *kills(bench, 19 if small else 200),
            *damage(bench, *((40, 10, 10) if small else (1000, 100, 100))),
            *races(bench, 3 if small else 50),
        ]


@click.command()
@click.option("--small", is_flag=True, help="A few of each fault.")
def main(small: bool) -> None:
    """Print the table of faults, and exit with 1 if a target is missed."""
    started = time.monotonic()
    lines = run(small=small)
    width = max(len(line.what) for line in lines)
    click.echo(f"{'fault':<{width}}  {'tried':>6}{'good':>6}{'target':>8}")
    for line in lines:
        target = "-" if line.target is None else str(line.target)
        click.echo(
            f"{line.what:<{width}}  {line.tried:>6}{line.good:>6}{target:>8}  {'MISSED ' if line.missed else ''}{line.note}".rstrip()
        )
    click.echo(f"{time.monotonic() - started:.0f} seconds")
    sys.exit(any(line.missed for line in lines))


if __name__ == "__main__":
    main()
