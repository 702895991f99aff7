"""`docs/format.md` is sufficient to read a cache.

Its code blocks, joined in order, read caches of every task and encoding with the same result as the
project's own reader. Its tables list every column, key and task.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict

import pipeline as softlabel
from pipeline import records
from pipeline.cache import Cache
from pipeline.cache.format import codec, pages, sanity, strict_json, tokenizer_files
from pipeline.cache.format.manifest import _ADDED
from pipeline.cache.format.schema import describe, soft_columns
from pipeline.cache.reading import shards
from pipeline.capture.labelled import LabelledRow
from pipeline.records import Columns, Encoding, Full, Sampled, Score, TopK, TopP, Views, is_known
from pipeline.softlabels import log_residual_bounds, target
from pipeline.tasks import TASKS, get_task
from tests.conftest import tiny_model
from tests.support.once import once
from tests.support.pictures import data_set, folders, pictures, untrained

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
OLD = Path(__file__).parents[1] / "data" / "caches"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CODE = compile("\n".join(BLOCKS), "docs/format.md", "exec")
#: First cell of every row of the page's tables -> the other cells.
TABLE = {
    name: cells.split(" | ")
    for line in PAGE.splitlines()
    if line.startswith("| `")
    for names, cells in re.findall(r"^\| (`[^|]+`) \| (.*) \|$", line)
    for name in re.findall(r"`([^`]+)`", names)
}


@pytest.fixture
def read(tmp_path, monkeypatch) -> Callable[[], dict[str, Any]]:
    """A function that runs the page's code, example included, and returns its global names."""

    def run() -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {}
        exec(CODE, names)
        return names

    return run


# ------------------------------------------------------------------------------ caches of all kinds


def logits(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32) * 3


def write(root: Path, task: str, tokenizer: Any, encoding: Encoding, rows: list[LabelledRow], **settings: Any) -> None:
    softlabel.write_cache(
        rows, root, task=task, tokenizer=tokenizer, encoding=encoding, teacher="t", rows_per_shard=2, **settings
    )


def classes(root: Path, tokenizer: Any, encoding: Encoding, count: int) -> None:
    rows = [
        LabelledRow(
            [2, 5 + i, 3], logits=logits(1, count), text=f"text {i} \u00e9", label=i or None, kept={"id": f"row-{i}"}
        )
        for i in range(3)
    ]
    write(root, "sequence-classification", tokenizer, encoding, rows, label_names=tuple(map(str, range(count))))


def words(root: Path, tokenizer: Any, encoding: Encoding) -> None:
    rows = [
        LabelledRow(
            [2, 5, 6, 7, 3],
            logits=logits(2, 3),
            supervised=[False, True, False, True, False],
            labels=[2, -100],
            words=["the", "cat"],
        )
    ] * 3
    write(root, "token-classification", tokenizer, encoding, rows, label_names=("O", "B-X", "I-X"))


def flags(root: Path, tokenizer: Any) -> None:
    rows = [LabelledRow([2, 5, 3], logits=logits(3, 2), text="a", labels=[1, 0, -100])] * 3
    write(root, "multi-label-classification", tokenizer, Full(), rows, label_names=("x", "y", "z"))


def scores(root: Path, tokenizer: Any) -> None:
    """Regression scores, where -100 is a valid score."""
    rows = [
        LabelledRow([2, 5, 3], logits=logits(2, 1), text="a", text_pair="b", labels=labels)
        for labels in ([0.1, float("nan")], [-100.0, 2.5])
    ]
    write(root, "sequence-regression", tokenizer, Score(), rows, label_names=("x", "y"))


def ranks(root: Path, tokenizer: Any) -> None:
    rows = [LabelledRow([2, 5, 3], logits=logits(1, 1), labels=[i], group=f"query {i // 2}") for i in range(4)]
    write(root, "text-ranking", tokenizer, Score(), rows, label_names=("relevance",))


def hidden(root: Path, tokenizer: Any) -> None:
    row = LabelledRow([2, 4, 6, 3], supervised=[0, 1, 1, 0], labels=[9, 6], logits=logits(2, len(tokenizer)))
    write(root, "masked-lm", tokenizer, Sampled(4.0), [row] * 3)


def pairs(root: Path, tokenizer: Any) -> None:
    row = LabelledRow([5, 6, 7, 3], supervised=[0, 0, 1, 1], logits=logits(2, len(tokenizer)))
    write(root, "seq2seq-lm", tokenizer, TopK(4), [row] * 3)


def choices(root: Path, tokenizer: Any, encoding: Encoding) -> None:
    rows = [
        LabelledRow(list(range(2, 2 + 4 * n)), logits=logits(1, n), label=n - 1, choice_lengths=[4] * n) for n in (2, 3)
    ]
    write(root, "multiple-choice", tokenizer, encoding, rows, num_classes=3)


def places(root: Path, tokenizer: Any, encoding: Encoding) -> None:
    rows = [LabelledRow(list(range(2, 2 + n)), logits=logits(2, n), labels=labels) for n, labels in PLACES]
    write(root, "question-answering", tokenizer, encoding, rows, max_length=9)


PLACES = ((6, [3, 4]), (9, [0, 0]), (5, [-100, -100]))


def tokens(root: Path, tokenizer: Any, encoding: Encoding, data: Dataset, **settings: Any) -> None:
    """A capture of a language model with the splits `train` and `test`."""
    parts = DatasetDict({"train": data.select(range(5)), "test": data.select(range(5, 7))})
    softlabel.cache_logits(
        tiny_model("llama", len(tokenizer), spread=4.0),
        parts,
        root,
        task="causal-lm",
        tokenizer=tokenizer,
        encoding=encoding,
        rows_per_shard=3,
        **settings,
    )


def images(root: Path, folder: Path, **settings: Any) -> None:
    source = str(folders(folder / "data", train=pictures(0, 5))) if settings else data_set(train=pictures(0, 5))
    columns = Columns(text=None, image="image")
    softlabel.cache_logits(
        str(untrained(folder / "vit", id2label={0: "blue", 1: "green", 2: "red"})),
        source,
        root,
        task="image-classification",
        columns=columns,
        **(settings or {"views": Views(2)}),
    )


CACHES: dict[str, Callable[..., None]] = {
    "classes full": lambda root, bert, lm, data: classes(root, bert, Full(), 5),
    "classes full, halves": lambda root, bert, lm, data: classes(root, bert, Full(), 4096),
    "classes top-k": lambda root, bert, lm, data: classes(root, bert, TopK(3, (1.0, 2.0, 4.0)), 9),
    "classes top-k, all": lambda root, bert, lm, data: classes(root, bert, TopK(5), 5),
    "classes sampled": lambda root, bert, lm, data: classes(root, bert, Sampled(6.0), 30),
    "words top-p": lambda root, bert, lm, data: words(root, bert, TopP(0.6, (0.5, 1.0, 1.5, 3.0))),
    "flags": lambda root, bert, lm, data: flags(root, bert),
    "scores": lambda root, bert, lm, data: scores(root, bert),
    "ranks": lambda root, bert, lm, data: ranks(root, bert),
    "hidden sampled": lambda root, bert, lm, data: hidden(root, bert),
    "pairs top-k": lambda root, bert, lm, data: pairs(root, bert),
    "choices full": lambda root, bert, lm, data: choices(root, bert, Full()),
    "choices sampled": lambda root, bert, lm, data: choices(root, bert, Sampled(2.0)),
    "places sampled": lambda root, bert, lm, data: places(root, bert, Sampled(3.0)),
    "places top-k": lambda root, bert, lm, data: places(root, bert, TopK(8)),
    "images": lambda root, bert, lm, data: images(root, root.parent),
    "image files": lambda root, bert, lm, data: images(root, root.parents[1], store_images=False),
    "tokens sampled": lambda root, bert, lm, data: tokens(
        root, lm, Sampled(5.0, 2.0), data, packing=True, isolate_documents=True, max_length=24
    ),
    "tokens top-k": lambda root, bert, lm, data: tokens(
        root,
        lm,
        TopK(4),
        data,
        max_length=24,
        store_text=True,
        store_entropy=True,
        store_label_logprobs=True,
        columns=Columns(keep=("number",)),
    ),
}


@pytest.fixture
def make(tmp_path, bert_tokenizer, lm_tokenizer, documents) -> Callable[[str], Cache]:
    def build(name: str) -> Cache:
        def caches(root: Path) -> None:
            data = documents["train"].add_column("number", list(range(len(documents["train"]))))
            CACHES[name](root / "runs" / "cache", bert_tokenizer, lm_tokenizer, data)

        once((__name__, name), caches, tmp_path)
        return Cache.open(tmp_path / "runs" / "cache")

    return build


# ----------------------------------------------------------------------------------------- decoding


def listed(values: Any) -> list[Any] | None:
    return None if values is None else values.tolist()


def check_labels(page: dict[str, Any], row: dict[str, Any], example: records.TokenizedExample) -> None:
    hard = get_task(page["manifest"]["contract"]["task"]).hard_labels([example])
    expected = [value if known else None for value, known in zip(hard.tolist(), is_known(hard), strict=True)]
    assert page["hard_labels"](row) == pytest.approx(expected)
    if example.document_lengths is not None:
        lengths = [length for length in example.document_lengths.tolist() if length]
        assert [len(part) for part in page["parts"](row)] == lengths
        assert [i for part in page["parts"](row) for i in part] == row["input_ids"]


def check_inputs(row: dict[str, Any], example: records.TokenizedExample) -> None:
    assert (row["source_row"], row["piece"]) == (example.source_row, example.piece)
    for name in ("input_ids", "supervised", "token_type_ids", "document_lengths"):
        if name in row or name != "input_ids":
            assert row.get(name) == listed(getattr(example, name)), name
    for name in ("text", "text_pair", "messages"):
        assert row.get(name) == getattr(example, name)
    assert row.get("text_bytes", 0) == example.text_bytes
    assert row.get("score_group") == example.group
    assert row.get("position_words") == (None if example.words is None else list(example.words))
    assert row.get("image_view") == listed(example.view)
    assert {name: row[name] for name in example.kept} == example.kept


def check_target(found: list[Any], soft: records.SoftLabels, temperature: float) -> None:
    goal = target(soft, temperature)
    assert len(found) == len(goal)
    assert [len(ids) for ids, _, _ in found] == goal.offsets.diff().tolist()
    np.testing.assert_array_equal(np.concatenate([ids for ids, _, _ in found]), goal.ids)
    weights = np.concatenate([weights for _, weights, _ in found])
    np.testing.assert_allclose(weights, goal.weights, rtol=2e-5, atol=1e-7)
    if goal.log_residual is None:
        assert all(outside is None for _, _, outside in found)
    else:
        outside = np.array([outside for _, _, outside in found])
        np.testing.assert_allclose(outside, goal.log_residual, rtol=2e-5, atol=2e-6)
        mass = np.array([weights.sum() for _, weights, _ in found]) + np.exp(outside)
        np.testing.assert_allclose(mass, 1, atol=1e-6)


def temperatures(encoding: Encoding) -> list[float]:
    if isinstance(encoding, Full):
        return [1.0, 0.7, 3.0]
    if isinstance(encoding, TopK | TopP):
        low, high = min(encoding.temperatures), max(encoding.temperatures)
        return [*encoding.temperatures, *np.linspace(low, high, 6)]
    return [encoding.temperature if isinstance(encoding, Sampled) else 1.0]


@pytest.mark.parametrize("name", CACHES)
def test_the_page_reads_what_the_reader_reads(make, read, name):
    check_cache(make(name), read())


@pytest.mark.parametrize("name", sorted(path.name for path in OLD.iterdir() if path.is_dir()))
def test_the_page_reads_caches_of_release_0_1(tmp_path, read, name):
    shutil.copytree(OLD / name, tmp_path / "runs" / "cache")
    check_cache(Cache.open(tmp_path / "runs" / "cache"), read())


def check_cache(cache: Cache, page: dict[str, Any]) -> None:
    """Compare rows and soft labels in order; check that the page lists the type of each column."""
    assert page["manifest"]["cache_id"] == cache.manifest.cache_id
    contract = cache.manifest.contract
    for split in cache.splits:
        rows, expected = list(page["read_rows"](cache.root, page["manifest"], split)), list(cache.dataset(split))
        assert len(rows) == len(expected) > 0
        for row, ours in zip(rows, expected, strict=True):
            check_inputs(row, ours.example)
            check_labels(page, row, ours.example)
            assert page["content_hash"](row) == row["content_hash"] == ours.content_hash
            page["check_row"](row, page["manifest"]["contract"])
            for stored in ("entropy", "label_logprobs"):
                assert row.get(stored) == listed(getattr(ours, stored))
            assert row["teacher_nll_sum"] == pytest.approx(ours.teacher_nll_sum, nan_ok=True)
            for temperature in temperatures(contract.encoding):
                check_target(
                    page["soft_labels"](row, page["manifest"]["contract"], temperature), ours.soft, temperature
                )
    check_types(contract.columns, contract.num_classes)


def test_hashes_of_lists_images_and_tokenizers(make, read, bert_tokenizer):
    cache = make("ranks")
    page = read()
    groups = [row["score_group"] for row in page["read_rows"](cache.root, page["manifest"], "train")]
    digests = [hashlib.blake2b(f"query {i // 2}".encode(), digest_size=8).digest() for i in range(4)]
    assert groups == [int.from_bytes(digest, "little") // 2 for digest in digests]
    rules = json.loads(bert_tokenizer.backend_tokenizer.to_str())
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    special = {name: str(token) for name, token in bert_tokenizer.special_tokens_map.items()}
    assert page["manifest"]["contract"]["tokenizer"]["sha256"] == sha256_of([rules, special])


def test_hashes_of_images(make, read):
    cache = make("images")
    page = read()
    for row in page["read_rows"](cache.root, page["manifest"], "train"):
        assert row["image_hash"] == int(hashlib.sha256(row["encoded_image"]["bytes"]).hexdigest()[:16], 16)
    settings = {
        name: value for name, value in json.loads(cache.tokenizer.to_json_string()).items() if value is not None
    }
    assert page["manifest"]["contract"]["tokenizer"]["sha256"] == sha256_of(settings)


def sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("name", ["classes full", "words top-p", "tokens sampled", "images"])
def test_parquet_is_written_as_the_page_says(make, name):
    cache = make(name)
    schema = cache.manifest.contract.columns
    for shard in cache.manifest.shards:
        path = cache.root / "data" / f"{shard.name}.parquet"
        file = pq.ParquetFile(path)
        assert file.metadata.metadata is None
        for i in range(file.metadata.num_columns):
            column = file.metadata.row_group(0).column(i)
            top, encodings = column.path_in_schema.partition(".")[0], set(column.encodings) - {"RLE"}
            assert (column.compression, column.has_column_index, column.has_offset_index) == ("ZSTD", True, True)
            if re.fullmatch(r"list<u?int\d+>", schema[top]):
                assert encodings == {"BYTE_STREAM_SPLIT"}, top
            elif schema[top] == "string" or top == "position_words":
                assert "RLE_DICTIONARY" in encodings, top
            else:
                assert encodings == {"PLAIN"}, top
            header = pages._Header(path.read_bytes()[column.data_page_offset :], top).read_struct()
            assert header[1] == 0  # a data page of version 1
            assert isinstance(header[4], int)  # its CRC


def check_types(columns: Mapping[str, str], num_classes: int) -> None:
    ids = "uint16" if num_classes <= 65_536 else "uint32"
    counts = "uint16" if num_classes < 65_536 else "uint32"
    for column, kind in columns.items():
        if column in codec.COLUMNS:
            cell = TABLE[column][0].replace("Ids", ids).replace("Counts", counts)
            assert f"`{kind}`" in cell, (column, kind, cell)


@pytest.mark.parametrize("num_classes", [2, 4095, 4096, 65_535, 65_536, 65_537])
def test_the_types_of_soft_labels(num_classes):
    for encoding in (Full(), TopK(4), TopP(0.5), Sampled()):
        found = describe(pa.schema(list(soft_columns(encoding, num_classes).items())))
        check_types(found, num_classes)
        if isinstance(encoding, Full):
            assert (found["logits"] == "list<halffloat>") == (num_classes >= 4096)


@pytest.mark.parametrize("name", ["tokens sampled", "choices sampled"])
def test_a_row_group_at_once_is_its_rows_one_after_another(make, read, name):
    cache = make(name)
    page = read()
    for shard in page["manifest"]["shards"]:
        tables = list(page["row_groups"](cache.root, shard))
        assert [table.num_rows for table in tables] == shard["row_groups"]
        for table in tables:
            position, ids, weights = page["sampled_row_group"](table, page["manifest"]["contract"]["encoding"])
            rows = [page["soft_labels"](row, page["manifest"]["contract"]) for row in table.to_pylist()]
            expected = [
                (n, int(i), float(w))
                for n, (classes, found, _) in enumerate(position for row in rows for position in row)
                for i, w in zip(classes, found, strict=True)
            ]
            found = zip(position.tolist(), ids.tolist(), weights.tolist(), strict=True)
            assert sorted(found) == sorted(expected)


def test_the_interpolated_mass_is_within_the_bounds(make, read):
    cache = make("words top-p")
    page = read()
    row, ours = next(page["read_rows"](cache.root, page["manifest"], "train")), cache.dataset("train")[0]
    for temperature in (0.6, 1.2, 2.9):
        low, high = log_residual_bounds(ours.soft, temperature)
        found = [each for _, _, each in page["soft_labels"](row, page["manifest"]["contract"], temperature)]
        assert (torch.tensor(found) >= low - 1e-5).all()
        assert (torch.tensor(found) <= high + 1e-5).all()
    for temperature in (0.4, 3.1):
        with pytest.raises(ValueError, match=r"expected 0\.5 to 3\.0"):
            page["soft_labels"](row, page["manifest"]["contract"], temperature)


def test_a_sample_serves_its_own_temperature_alone(make, read):
    cache = make("tokens sampled")
    page = read()
    row = next(page["read_rows"](cache.root, page["manifest"], "train"))
    with pytest.raises(ValueError, match=r"expected 2\.0"):
        page["soft_labels"](row, page["manifest"]["contract"], 1.0)


# ------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "format version 2"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "cache_id differs"),
        (lambda text: text.replace('"bad_rows": 0', '"bad_rows": 1'), "sha256 differs"),
        (lambda text: text.replace('"bad_rows": 0', '"bad_rows": NaN'), "NaN is not JSON"),
        (lambda text: text.replace('"bad_rows": 0', '"bad_rows": 0, "bad_rows": 0'), "a key occurs twice"),
    ],
)
def test_an_edited_manifest_is_found(make, read, change, message):
    path = make("classes full").root / "manifest.json"
    page = read()
    text = path.read_text(encoding="utf-8")
    assert change(text) != text
    path.write_text(change(text), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        page["load_manifest"](path.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda contract, shard: contract.update(task="poems"), "unknown task or encoding: poems"),
        (lambda contract, shard: contract["encoding"].update(kind="half"), "unknown task or encoding"),
        (lambda contract, shard: contract["encoding"].update(scale=2), "unknown task or encoding"),
        (lambda contract, shard: contract["tokenization"].update(reversed=True), "unknown keys: {'reversed'}"),
        (lambda contract, shard: shard.update(name="../data/train-00000"), "shard names"),
    ],
)
def test_what_a_reader_must_refuse_is_refused_under_valid_hashes(make, read, change, message):
    path = make("classes full").root / "manifest.json"
    page = read()
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest["contract"], manifest["shards"][0])
    manifest["cache_id"] = page["canonical_sha256"]([manifest["contract"], manifest["shards"]])
    manifest["sha256"] = page["canonical_sha256"]({**manifest, "sha256": ""})
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        page["load_manifest"](path.parent)


def test_the_names_that_the_page_accepts_are_all_there_are(read, make):
    make("classes full")
    page = read()
    assert set(page["TASKS"]) == set(TASKS)
    assert set(page["TOKENIZATION"]) == {field.name for field in dataclasses.fields(records.Tokenization)}
    for encoding in (Full(), TopK(50), TopP(0.9), Sampled(), Score()):
        assert page["ENCODINGS"][encoding.kind] == set(dataclasses.asdict(encoding))
    assert page["NAME"].pattern == sanity.NAME.pattern


def test_a_changed_shard_is_found(make, read):
    cache = make("classes full")
    page = read()
    shard, contract = page["manifest"]["shards"][0], page["manifest"]["contract"]
    path = cache.root / "data" / f"{shard['name']}.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:99] + bytes([whole[99] ^ 4]) + whole[100:])
    with pytest.raises(ValueError, match=r"train-00000\.parquet: differs from manifest"):
        page["check_shard"](cache.root, shard, contract)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="the footer differs"):
        page["check_shard"](cache.root, {**shard, "footer_sha256": "0" * 64}, contract)
    with pytest.raises(ValueError, match=r"expected the row groups \[1, 1\]"):
        page["check_shard"](cache.root, {**shard, "row_groups": [1, 1]}, contract)
    with pytest.raises(ValueError, match="expected the columns"):
        page["check_shard"](cache.root, shard, {**contract, "columns": {**contract["columns"], "text": "int32"}})


def repeat_a_class(row: dict[str, Any]) -> None:
    row["top_count"][0] += 1
    for name in ("top_ids", "top_weights"):
        row[name].insert(0, row[name][0])


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "input_ids: expected 0 to": lambda row: row["input_ids"].__setitem__(0, -1),
    "the last token": lambda row: row["supervised"].__setitem__(-1, True),
    "supervised: expected": lambda row: row["supervised"].append(False),
    "document_lengths: expected": lambda row: row["document_lengths"].append(1),
    "top_ids: expected their number": lambda row: row["top_count"].__setitem__(0, row["top_count"][0] + 1),
    "top_ids: expected each class once": repeat_a_class,
    "supervised: expected a position": lambda row: row.update(supervised=[False] * len(row["supervised"])),
    "top_ids: expected 0 to": lambda row: row["top_ids"].__setitem__(0, 320),
    "top_weights: expected 0 to 16": lambda row: row["top_weights"].__setitem__(0, 17),
    "tail_count: expected N": lambda row: row["tail_count"].append(0),
    "tail_gaps: expected classes": lambda row: row["tail_gaps"].__setitem__(0, 320),
    "content_hash differs": lambda row: row["input_ids"].__setitem__(0, row["input_ids"][0] ^ 1),
}


def test_a_row_that_cannot_be_is_found(make, read):
    cache = make("tokens sampled")
    page = read()
    row = next(page["read_rows"](cache.root, page["manifest"], "train"))
    for message, change in CHANGES.items():
        changed = copy.deepcopy(row)
        change(changed)
        with pytest.raises(ValueError, match=f"source row 0: .*{re.escape(message)}"):
            page["check_row"](changed, page["manifest"]["contract"])


# -------------------------------------------------------------------------------------------- words


def test_the_blocks_use_nothing_of_ours():
    modules = {
        name
        for node in ast.walk(ast.parse("\n".join(BLOCKS)))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    assert modules == {"duckdb", "hashlib", "json", "math", "numpy", "pathlib", "pyarrow.parquet", "re"}


def test_every_column_and_task_stands_in_a_table():
    assert codec.COLUMNS - TABLE.keys() == set()
    assert TASKS.keys() - TABLE.keys() == set()


def test_every_key_stands_on_the_page_and_the_optional_ones_are_marked():
    kinds = (
        *(records.Manifest, records.Contract, records.ModelInfo, records.TokenizerInfo, records.SourceInfo),
        *(records.Tokenization, records.Shard, records.AlignmentProbe, records.Ancestor, records.Receipt),
        *(records.Columns, records.Masking, records.Views, records.JudgeInfo, records.ServerInfo),
        *(records.UnlabelledSource, records.Moments, records.ShardPlan, records.BadRow),
    )
    spans = set(re.findall(r"`([^`\n]+)`", PAGE))
    for kind in kinds:
        names = [field.name for field in dataclasses.fields(kind)]
        assert set(names) <= spans, kind
        if kind in kinds[:7]:
            marked = {name for name in names if "optional" in TABLE[name][0]}
            assert marked == _ADDED & set(names), kind


def test_the_limits_are_those_of_the_reader():
    for limit in (
        f"{strict_json._MOST_BYTES >> 20} MiB, {strict_json._MOST_CONTAINERS:,} lists and objects, {strict_json._MOST_ITEMS:,} items",
        f"{sanity._MOST_STRING:,} characters each",
        f"1 to 2^{sanity._MOST.bit_length() - 1} - 1",
        f"| 2^{sanity._MOST_CLASSES.bit_length() - 1} |",
        f"| {pages._MOST_FOOTER >> 20} MiB;",
        f"| {pages.MOST_BYTES >> 20} MiB, bounded",
        f"| {pages._MOST_PAGES:,} |",
        f"at most {tokenizer_files._MOST_BYTES >> 20} MiB each",
        f"`{sanity.NAME.pattern}`",
        *(f"`{suffix}`" for suffix in (*tokenizer_files._SUFFIXES, *shards._PICKLED)),
    ):
        assert limit in PAGE, limit


def test_the_encodings_are_written_as_the_page_shows_them():
    shown = {json.loads(text)["kind"]: json.loads(text) for text in re.findall(r"`(\{[^`]*\"kind\"[^`]*\})`", PAGE)}
    assert shown.keys() == {"full", "top-k", "top-p", "sampled", "score"}
    for encoding in (Full(), TopK(50), TopP(0.9), Sampled(), Score()):
        assert shown[encoding.kind] == json.loads(json.dumps(dataclasses.asdict(encoding)))
