"""Malicious caches, each a modified copy of a good one with recomputed hashes.

Run as a program, it opens every cache of a folder and prints as JSON what happened:

    python -m tests.support.hostile FOLDER
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CACHES: dict[str, Callable[[Path], None]] = {}


def hostile(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Register a function that changes a copy of the good cache."""
    CACHES[change.__name__] = change
    return change


def text_of(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def forge(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest, and recompute its hashes."""
    path = root / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    content["cache_id"] = digest([content["contract"], content["shards"]])
    content["sha256"] = digest({**content, "sha256": ""})
    path.write_text(text_of(content))


def replace_shard(root: Path, data: bytes, groups: list[int] | None = None) -> None:
    """Replace the first shard's file, and list it in the manifest."""
    path = root / "data" / "train-00000.parquet"
    path.write_bytes(data)
    length = int.from_bytes(data[-8:-4], "little")

    def change(content: dict[str, Any]) -> None:
        shard = content["shards"][0]
        shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        shard.update(footer_sha256=hashlib.sha256(data[-8 - length : -8]).hexdigest())
        if groups is not None:
            shard.update(row_groups=groups, rows=sum(groups))

    forge(root, change)


def rewrite(root: Path, change: Callable[[pa.Table], pa.Table], **settings: Any) -> None:
    """Change the first shard's table, and write it with the settings of a capture."""
    path = root / "data" / "train-00000.parquet"
    table = change(pq.read_table(path))
    options = {"compression": "zstd", "write_page_checksum": True, "store_schema": False, **settings}
    pq.write_table(table, path, row_group_size=len(table), **options)
    replace_shard(root, path.read_bytes(), [len(table)])


def column(table: pa.Table, name: str, change: Callable[[list[Any]], Any], kind: pa.DataType | None = None) -> pa.Table:
    """Return the table with one column's rows changed."""
    rows = table.column(name).to_pylist()
    rows = change(rows) or rows
    at = table.schema.get_field_index(name)
    return table.set_column(at, name, pa.array(rows, type=kind or table.schema.field(name).type))


def outside(root: Path) -> Path:
    """Return a directory outside the cache that must stay untouched."""
    return root.parent.parent / "outside"


# ---------------------------------------------------------------------------------------- manifests


def _named(name: str) -> Callable[[Path], None]:
    return lambda root: forge(root, lambda m: m["shards"][0].update(name=name))


for _what, _name in {
    "path_upwards": "../../outside/secret",
    "path_absolute": "/etc/passwd",
    "path_backslash": "..\\outside",
    "path_drive": "C:secret",
    "path_too_long": "a" * 300,
    "path_of_nul": "a\0b",
}.items():
    CACHES[_what] = _named(_name)

for _what, _change in {
    "shard_twice": lambda m: m["shards"].append(m["shards"][0]),
    "split_is_a_path": lambda m: m["shards"][0].update(split="../x"),
    "rows_negative": lambda m: m["shards"][0].update(rows=-1, row_groups=[-1]),
    "rows_beyond_all_bounds": lambda m: m["shards"][0].update(rows=10**300, row_groups=[10**300]),
    "row_groups_that_are_not_the_rows": lambda m: m["shards"][0].update(row_groups=[1, 1]),
    "bytes_beyond_all_bounds": lambda m: m["shards"][0].update(bytes=10**30),
    "classes_beyond_all_bounds": lambda m: m["contract"].update(num_classes=2**40),
    "classes_beyond_the_vocabulary": lambda m: m["contract"].update(num_classes=4000),
    "one_class": lambda m: m["contract"].update(num_classes=1),
    "vocabulary_beyond_all_bounds": lambda m: m["contract"]["tokenizer"].update(vocabulary_size=2**40),
    "special_id_negative": lambda m: m["contract"]["tokenizer"].update(special_ids={"pad": -7}),
    "no_such_task": lambda m: m["contract"].update(task="os.system"),
    "labels_of_a_language_model": lambda m: m["contract"].update(label_names=["a", "b"]),
    "encoding_of_other_columns": lambda m: m["contract"].update(
        encoding={"k": 3, "temperatures": [1.0], "kind": "top-k"}
    ),
    "temperature_of_zero": lambda m: m["contract"]["encoding"].update(temperature=0.0),
    "column_of_an_extension_type": lambda m: m["contract"]["columns"].update(id="extension<arrow.py_extension_type>"),
    "column_of_dates": lambda m: m["contract"]["columns"].update(id="timestamp[ns]"),
    "escape_sequence_in_a_name": lambda m: m["contract"]["teacher"].update(name="\x1b]0;owned\x07"),
    "key_of_its_own": lambda m: m["contract"].update(trust_remote_code=True),
    "format_version_is_a_list": lambda m: m.update(format_version=[1] * 1000),
    "no_shards": lambda m: m.update(shards=[]),
}.items():
    CACHES[_what] = lambda root, change=_change: forge(root, change)


def _raw(text: Callable[[str], bytes]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / "manifest.json"
        path.write_bytes(text(path.read_text()))

    return change


for _what, _text in {
    "json_nested_deeply": lambda _: b'{"format_version": 1, "contract": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "json_of_many_lists": lambda _: b'{"format_version": 1, "x": [' + b"[]," * 10_000_000 + b"[]]}",
    "json_of_many_numbers": lambda _: b'{"format_version": 1, "x": [' + b"1," * 15_000_000 + b"1]}",
    "json_with_a_key_twice": lambda t: t.replace(
        '"format_version": 1,', '"format_version": 1,\n "format_version": 1,'
    ).encode(),
    "json_with_nan": lambda t: t.replace('"sample_size": 6.0', '"sample_size": NaN').encode(),
    "json_with_half_a_character": lambda t: t.replace('"name": "tiny"', '"name": "\\ud800"').encode(),
    "json_with_a_number_of_a_million_digits": lambda t: t.replace('"seed": 0', '"seed": ' + "9" * 1_000_000).encode(),
    "json_in_another_encoding": lambda t: t.encode("utf-16"),
}.items():
    CACHES[_what] = _raw(_text)


@hostile
def manifest_of_a_terabyte(root: Path) -> None:
    os.truncate(root / "manifest.json", 1 << 40)


@hostile
def manifest_is_a_link(root: Path) -> None:
    (root / "manifest.json").rename(outside(root) / "manifest.json")
    (root / "manifest.json").symlink_to(outside(root) / "manifest.json")


@hostile
def manifest_is_a_pipe(root: Path) -> None:
    (root / "manifest.json").unlink()
    os.mkfifo(root / "manifest.json")


# ------------------------------------------------------------------------------------------- shards


@hostile
def shard_is_a_link(root: Path) -> None:
    path = root / "data" / "train-00000.parquet"
    shutil.copy(path, outside(root) / "shard.parquet")
    path.unlink()
    path.symlink_to(outside(root) / "shard.parquet")


@hostile
def data_is_a_link(root: Path) -> None:
    shutil.copytree(root / "data", outside(root) / "data", dirs_exist_ok=True)
    shutil.rmtree(root / "data")
    (root / "data").symlink_to(outside(root) / "data")


@hostile
def class_out_of_range(root: Path) -> None:
    rewrite(root, lambda t: column(t, "top_ids", lambda rows: rows[3].__setitem__(0, 41)))


@hostile
def token_negative(root: Path) -> None:
    rewrite(root, lambda t: column(t, "input_ids", lambda rows: rows[3].__setitem__(0, -1)))


@hostile
def token_out_of_range(root: Path) -> None:
    rewrite(root, lambda t: column(t, "input_ids", lambda rows: rows[3].__setitem__(0, 1 << 30)))


@hostile
def last_token_supervised(root: Path) -> None:
    rewrite(root, lambda t: column(t, "supervised", lambda rows: rows[3].__setitem__(-1, True)))


@hostile
def counts_moved_between_rows(root: Path) -> None:
    """Move counts between rows and keep the totals of the row group."""

    def change(rows: list[list[int]]) -> None:
        rows[0][0] += 1
        rows[1][0] -= 1

    rewrite(root, lambda t: column(t, "top_count", change))


@hostile
def flags_moved_between_rows(root: Path) -> None:
    rewrite(root, lambda t: column(t, "supervised", lambda rows: [rows[0] + [False], rows[1][:-1], *rows[2:]]))


@hostile
def row_of_no_tokens(root: Path) -> None:
    rewrite(root, lambda t: column(t, "input_ids", lambda rows: rows.__setitem__(2, [])))


@hostile
def row_of_nothing(root: Path) -> None:
    rewrite(root, lambda t: column(t, "input_ids", lambda rows: rows.__setitem__(2, None)))


@hostile
def token_of_nothing(root: Path) -> None:
    rewrite(root, lambda t: column(t, "input_ids", lambda rows: rows[2].__setitem__(1, None)))


@hostile
def weight_above_one(root: Path) -> None:
    rewrite(root, lambda t: column(t, "top_weights", lambda rows: rows[2].__setitem__(0, 60_000)))


@hostile
def gaps_beyond_the_classes(root: Path) -> None:
    rewrite(root, lambda t: column(t, "tail_gaps", lambda rows: [[40] * len(row) for row in rows]))


@hostile
def hash_of_other_tokens(root: Path) -> None:
    rewrite(root, lambda t: column(t, "content_hash", lambda rows: rows.__setitem__(0, 7)))


@hostile
def one_text_a_thousand_times(root: Path) -> None:
    """Refer to a dictionary entry of 1 MB in 4,000 rows: 4 GB."""

    def change(table: pa.Table) -> pa.Table:
        long = pa.concat_tables([table] * 134).slice(0, 4000)
        at = long.schema.get_field_index("id")
        texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(4000, np.int32)), pa.array(["x" * (1 << 20)]))
        return long.set_column(at, "id", texts)

    rewrite(root, change, use_dictionary=["id"], dictionary_pagesize_limit=1 << 26)


@hostile
def sixty_million_flags(root: Path) -> None:
    """Store runs of equal flags, which take almost no bytes in Parquet."""

    def change(table: pa.Table) -> pa.Table:
        flags = pa.array(np.zeros(60_000_000 // 8, np.uint8)).buffers()[1]
        values = pa.Array.from_buffers(pa.bool_(), 60_000_000, [None, flags])
        offsets = np.full(len(table) + 1, 60_000_000, np.int32)
        offsets[0] = 0
        at = table.schema.get_field_index("supervised")
        return table.set_column(at, "supervised", pa.ListArray.from_arrays(offsets, values))

    rewrite(root, change)


@hostile
def one_page_of_a_quarter_of_a_gigabyte(root: Path) -> None:
    rewrite(root, lambda t: column(t, "id", lambda rows: ["x" * ((1 << 28) + 1), *rows[1:]]), use_dictionary=False)


@hostile
def lists_of_lists(root: Path) -> None:
    forge(root, lambda m: m["contract"]["columns"].update(id="list<int32>"))
    rewrite(root, lambda t: column(t, "id", lambda rows: [[[1]]] * len(rows), pa.list_(pa.list_(pa.int32()))))


@hostile
def physical_type_int96(root: Path) -> None:
    rewrite(
        root,
        lambda t: column(t, "id", lambda rows: [0] * len(rows), pa.timestamp("ns")),
        use_deprecated_int96_timestamps=True,
    )


@hostile
def extension_type(root: Path) -> None:
    """Store the schema from which Arrow would unpickle the extension type."""
    field = pa.field(
        "id",
        pa.binary(),
        metadata={
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": pickle.dumps(os.getcwd),
        },
    )
    rewrite(
        root,
        lambda t: t.set_column(t.schema.get_field_index("id"), field, pa.array([b"x"] * len(t), pa.binary())),
        store_schema=True,
    )


@hostile
def column_too_many(root: Path) -> None:
    rewrite(root, lambda t: t.append_column("payload", pa.array([b"x"] * len(t))))


@hostile
def column_too_few(root: Path) -> None:
    rewrite(root, lambda t: t.drop_columns(["tail_gaps"]))


@hostile
def footer_longer_than_the_file(root: Path) -> None:
    data = bytearray((root / "data" / "train-00000.parquet").read_bytes())
    data[-8:-4] = (1 << 31).to_bytes(4, "little")
    replace_shard(root, bytes(data))


@hostile
def encrypted(root: Path) -> None:
    data = (root / "data" / "train-00000.parquet").read_bytes()
    replace_shard(root, data[:-4] + b"PARE")


@hostile
def no_parquet_at_all(root: Path) -> None:
    replace_shard(root, pickle.dumps({"payload": b"x" * 1000}) + b"PAR1")


@hostile
def shard_that_nobody_lists(root: Path) -> None:
    shutil.copy(root / "data" / "train-00000.parquet", root / "data" / "more.parquet")


# -------------------------------------------------------------------------------------- other files


def _code(root: Path) -> str:
    return f"open({str(outside(root) / 'code-was-run')!r}, 'w').close()\nclass Evil: pass\n"


@hostile
def tokenizer_with_code(root: Path) -> None:
    path = root / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.update(auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil")
    path.write_text(json.dumps(config))
    (root / "tokenizer" / "evil.txt").write_text(_code(root))


@hostile
def code_beside_the_tokenizer(root: Path) -> None:
    (root / "tokenizer" / "evil.py").write_text(_code(root))


@hostile
def loading_script(root: Path) -> None:
    (root / "cache.py").write_text(_code(root))


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@hostile
def pickle_beside_the_tokenizer(root: Path) -> None:
    (root / "tokenizer" / "tokenizer.bin").write_bytes(pickle.dumps(_Payload(outside(root) / "code-was-run")))


@hostile
def pickle_beside_the_shards(root: Path) -> None:
    (root / "data" / "train.pkl").write_bytes(pickle.dumps(_Payload(outside(root) / "code-was-run")))


@hostile
def tokenizer_file_is_a_link(root: Path) -> None:
    path = root / "tokenizer" / "tokenizer.json"
    path.rename(outside(root) / "tokenizer.json")
    path.symlink_to(outside(root) / "tokenizer.json")


@hostile
def tokenizer_nested_deeply(root: Path) -> None:
    (root / "tokenizer" / "tokenizer.json").write_text('{"model": ' + "[" * 100_000 + "]" * 100_000 + "}")


@hostile
def tokenizer_settings_nested_deeply(root: Path) -> None:
    (root / "tokenizer" / "tokenizer_config.json").write_text('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}")


@hostile
def tokenizer_of_a_terabyte(root: Path) -> None:
    os.truncate(root / "tokenizer" / "tokenizer.json", 1 << 40)


@hostile
def tokenizer_of_another_cache(root: Path) -> None:
    path = root / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))


# ------------------------------------------------------------------------------- opening the caches


def watch() -> list[str]:
    """Record, from now on, operations of the process that opening a cache does not need."""
    import sys

    seen: list[str] = []
    forbidden = (
        "pickle.find_class",
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "socket.connect",
        "marshal.loads",
    )

    def hook(event: str, args: Any) -> None:
        if event == "marshal.loads" and "site-packages" in str(sys._getframe(1).f_code.co_filename):
            return
        if event == "open" and (isinstance(args[1], str) and set(args[1]) & set("wax+")):
            seen.append(f"open {args[0]} {args[1]}")
        elif event in (
            "os.remove",
            "os.rename",
            "os.mkdir",
            "os.rmdir",
            "shutil.rmtree",
            "os.link",
            "os.symlink",
            "os.truncate",
        ):
            seen.append(f"{event} {args[0]}")
        elif event in forbidden and event != "marshal.loads":
            seen.append(f"{event} {args}"[:200])
        elif event == "exec" and "hostile-caches" in str(getattr(args[0], "co_filename", "")):
            seen.append(f"exec {args[0].co_filename}")

    sys.addaudithook(hook)
    return seen


def attempt(root: Path) -> str:
    """Do everything that a user would do with a downloaded cache.

    Returns:
        The first line of the error that refuses it, or how it was accepted.
    """
    from pipeline.cache import Cache, verify
    from pipeline.cache.views.inspection import describe
    from pipeline.errors import PipelineError

    said = []
    for use in (
        _read,
        lambda root: verify(root).raise_first(),
        lambda root: list(describe(Cache.open(root), split=None, rows=2, tokens=4, top=2)),
    ):
        try:
            use(root)
        except PipelineError as error:
            said.append(str(error))
        except BaseException as error:
            return f"NOT A LINE: {type(error).__name__}: {error}"[:300]
    lines = [line for line in said if "\n" in line or len(line) > 1000]
    return f"NOT A LINE: {lines[0][:300]}" if lines else said[0] if said else "NOT REFUSED"


def _read(root: Path) -> None:
    from pipeline.cache import Cache

    cache = Cache.open(root)
    _ = cache.tokenizer
    for split in cache.splits:
        rows = cache.dataset(split)
        rows.num_tokens()
        for _row in rows:
            pass


def peak_kb() -> int:
    """Return the peak memory of this process.

    It is read from /proc, since getrusage starts from the parent's peak.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    """Open every cache of a folder, and print errors, recorded operations and memory as JSON."""
    import sys
    import time

    folder = Path(sys.argv[1])
    _read(folder / "good")  # warm-up: loads the libraries
    start = peak_kb()
    seen = watch()
    found = {}
    for root in sorted(folder.iterdir()):
        begun = time.process_time()
        before = peak_kb()
        said = attempt(root)
        grown = peak_kb() - before
        found[root.name] = {"said": said, "seconds": time.process_time() - begun, "grown_mb": grown >> 10}
    peak = peak_kb()
    print(json.dumps({"caches": found, "seen": seen, "above_start_mb": (peak - start) >> 10}))


if __name__ == "__main__":
    main()
