"""`--store-text` for language models, in captures and transforms."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from datasets import Dataset
from pydantic import TypeAdapter

import pipeline as softlabel
from pipeline.cache import Cache, verify
from pipeline.cache.format.rows import gather
from pipeline.cache.transforms import convert, filter_rows, merge
from pipeline.capture import shard as module
from pipeline.capture.estimate import run as estimating
from pipeline.capture.estimate.table import format_estimate
from pipeline.capture.run import run
from pipeline.cli import main
from pipeline.config import CacheLogitsConfig, DataConfig, load_config, resolve
from pipeline.errors import ContractError, MisuseError
from pipeline.records import Columns, Estimate, Sampled
from pipeline.tasks.texts import read_conversation
from tests.capture.test_chat_captures import CHATS, teacher  # noqa: F401 - a fixture
from tests.capture.test_chat_captures import config_of as chats_of
from tests.conftest import tiny_model
from tests.support.captures import config, hashes  # noqa: F401 - a fixture


def with_text(config: CacheLogitsConfig, store_text: bool | None = True) -> CacheLogitsConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, store_text=store_text))


def source_of(config: CacheLogitsConfig, split: str = "train") -> list[str]:
    lines = Path(config.data.dataset, f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def contents(cache: Cache) -> list[tuple[int, int, int, list[int]]]:
    return [
        (row.example.source_row, row.example.piece, row.content_hash, row.example.input_ids.tolist())
        for row in cache.dataset("train")
    ]


def test_each_piece_has_its_part_of_the_text(config):
    plain, made = run(config("plain")), run(with_text(config()))
    assert contents(plain) == contents(made)  # the same rows in the same order
    assert "text" not in plain.manifest.contract.columns
    assert plain.manifest.contract.store_text == made.manifest.contract.store_text is True
    assert made.manifest.contract.columns["text"] == "string"
    texts = source_of(config())
    pieces: dict[int, list[str]] = {}
    for row in made.dataset("train"):
        assert row.example.text in texts[row.example.source_row]
        assert made.tokenizer.decode(row.example.input_ids) == row.example.text
        pieces.setdefault(row.example.source_row, []).append(row.example.text)
    assert any(len(parts) > 1 for parts in pieces.values())
    for number, parts in pieces.items():
        assert texts[number].startswith(parts[0])
        assert texts[number].endswith(parts[-1])
    assert verify(made.root).problems == ()
    block = next(iter(made.dataset("train").blocks(8)))
    assert block.others["text"].to_pylist() == [made.dataset("train")[i].example.text for i in range(8)]
    card = (made.root / "README.md").read_text()
    assert "--store-text" in card
    assert "`text`: the part of the source's text" in card
    assert "--store-text" not in (plain.root / "README.md").read_text()
    shown = CliRunner().invoke(main, ["inspect", "--cache", str(made.root), "--html", str(made.root.parent / "p.html")])
    assert shown.exit_code == 0, shown.output


def test_a_stopped_capture_goes_on_with_its_texts_alone(config, monkeypatch):
    plain, made = module.record, []

    def stops(layout, receipt):
        plain(layout, receipt)
        made.append(receipt)
        if len(made) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "record", stops)
    with pytest.raises(KeyboardInterrupt):
        run(with_text(config()))
    monkeypatch.setattr(module, "record", plain)
    for other in (None, False):
        with pytest.raises(ContractError, match=r"contract\.(columns\.text|store_text)"):
            run(with_text(config(), other))
    assert hashes(run(with_text(config()))) == hashes(run(with_text(config("whole"))))


def test_what_is_made_of_such_a_cache_keeps_the_texts(config, tmp_path):
    made = run(with_text(config(rows="0:8", encoding="full")))
    more = run(with_text(config("more", rows="8:14", encoding="full")))
    without = run(config("without", rows="8:14", encoding="full"))
    texts = [row.example.text for row in made.dataset("train")]
    converted = convert(made, tmp_path / "s", encoding=Sampled(6.0))
    assert [row.example.text for row in converted.dataset("train")] == texts
    part = filter_rows(made, tmp_path / "f", where="length(text) > 100")
    assert [row.example.text for row in part.dataset("train")] == [text for text in texts if len(text) > 100]
    assert 0 < len(part.dataset("train")) < len(texts)
    merged = merge([made, more], tmp_path / "m")
    assert [row.example.text for row in merged.dataset("train")][: len(texts)] == texts
    for cache in (converted, part, merged):
        assert verify(cache.root).problems == ()
    with pytest.raises(ContractError, match=r"columns\.text"):
        merge([made, without], tmp_path / "n")
    one, other = (next(iter(cache.dataset("train").blocks(2))) for cache in (made, without))
    assert "text" not in gather([(one, 0, 1), (other, 0, 1)]).others
    assert "text" not in gather([(other, 0, 1), (one, 0, 1)]).others
    grown = run(with_text(config(rows="0:14", encoding="full", append=True)))
    assert [row.example.text for row in grown.dataset("train")] == [row.example.text for row in merged.dataset("train")]


def test_a_chat_has_its_conversation(teacher, tmp_path):
    plain = run(chats_of(teacher))
    made = run(dataclasses.replace(with_text(chats_of(teacher)), output=str(tmp_path / "kept")))
    assert contents(plain) == contents(made)
    assert [name in made.manifest.contract.columns for name in ("messages", "text")] == [True, False]
    rows = [row.example for row in made.dataset("train")]
    found = [json.loads(row.messages) for row in rows]
    assert [(row.source_row, row.piece, each["learnt"]) for row, each in zip(rows, found, strict=True)] == [
        (0, 0, [1]),
        (1, 0, [1]),
        (1, 1, [3]),
    ]
    assert [each["messages"] for each in found] == [CHATS[0], CHATS[1][:2], CHATS[1]]
    assert [each["tools"] for each in found] == [None] * 3
    messages, tools = read_conversation(rows[2].messages)
    assert [(each.role, each.learnt) for each in messages] == [
        ("user", False),
        ("assistant", False),
        ("user", False),
        ("assistant", True),
    ]
    assert tools is None
    assert verify(made.root).problems == ()
    assert "messages" in next(iter(made.dataset("train").blocks(2))).others
    assert "`messages`: the conversation that the row was rendered from" in (made.root / "README.md").read_text()
    part = filter_rows(made, tmp_path / "f", where="json_array_length(messages, '$.messages') > 2")
    assert [row.example.messages for row in part.dataset("train")] == [rows[2].messages]


def test_prompts_with_completions_and_lists_of_turns(tmp_path, lm_tokenizer, teacher):
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0)
    data = Dataset.from_dict({"p": ["the cat ", "a dog "], "c": ["sat", "ran"]})
    columns = Columns(text=None, prompt="p", completion="c", label=None)
    settings = {"task": "causal-lm", "columns": columns, "store_text": True}
    made = softlabel.cache_logits(model, data, tmp_path / "c", tokenizer=lm_tokenizer, **settings)
    for row, text in zip(made.dataset("train"), ["the cat sat", "a dog ran"], strict=True):
        assert row.example.text == text
        assert text.encode()[-row.example.text_bytes :] in (b"sat", b"ran")
    turns = Dataset.from_dict({"p": [chat[:1] for chat in CHATS], "c": [chat[1:2] for chat in CHATS]})
    made = softlabel.cache_logits(str(teacher), turns, tmp_path / "d", **settings)
    assert [json.loads(row.example.messages)["learnt"] for row in made.dataset("train")] == [[1], [1]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"packing": True}, "--store-text does not go with --packing: a packed row is made of pieces of several texts"),
        ({"input_ids_column": "ids"}, "--store-text: rows of token ids .* have no text; leave it out"),
    ],
)
@pytest.mark.parametrize("command", ["cache-logits", "estimate"])
def test_rows_without_a_text_are_refused(config, tmp_path, data, message, command):
    ids = Dataset.from_dict({"ids": [[1, 2, 3]] * 3, "text": ["the cat"] * 3})
    ids.to_json(tmp_path / "ids.jsonl")
    flags = ["--packing"] if "packing" in data else ["--input-ids-column", "ids"]
    common = [command, "--task", "causal-lm", "--teacher", config().teacher, "--dataset", str(tmp_path / "ids.jsonl")]
    more = ["--output", str(tmp_path / "x")] if command == "cache-logits" else []
    done = CliRunner().invoke(main, [*common, *flags, "--store-text", *more])
    assert done.exit_code == 2, done.output
    assert re.search(f"^Error: {message}", done.output, re.MULTILINE), done.output
    assert not (tmp_path / "x").exists()


def test_the_flag_and_the_file_say_the_same(config, tmp_path):
    file = tmp_path / "f.yaml"
    for line, expected in (("store_text: true", True), ("store_text: false", False), ("", None)):
        file.write_text(f"task: causal-lm\ndata:\n  dataset: x\n  {line}\ncache-logits:\n  teacher: t\n  output: o\n")
        loaded = load_config(str(file))
        found = resolve(CacheLogitsConfig, loaded, loaded.sections["cache-logits"][0], {})
        assert found.data.store_text is expected
    assert DataConfig(dataset="x").store_text is None
    common = ["--task", "causal-lm", "--teacher", config().teacher, "--dataset", config().data.dataset]
    for flag, has in (("--store-text", True), ("--no-store-text", False)):
        output = tmp_path / flag.strip("-")
        done = CliRunner().invoke(main, ["cache-logits", *common, flag, "--rows", "0:2", "--output", str(output)])
        assert done.exit_code == 0, done.output
        contract = Cache.open(output).manifest.contract
        assert ("text" in contract.columns, contract.store_text) == (has, has)


def test_a_kept_column_with_the_name_of_one_of_ours_is_refused(teacher):
    rows = {"chat": CHATS, "text": ["a", "b"]}
    Dataset.from_dict(rows).to_json(teacher.parent / "chats.jsonl")
    with pytest.raises(MisuseError, match="--keep-column text: a column of this name means something else in a cache"):
        run(chats_of(teacher, keep_column=("text",)))


@pytest.mark.full
def test_the_estimate_says_what_they_take(config, teacher, monkeypatch):
    monkeypatch.setattr(estimating, "SAMPLE_SIZES", (6.0, 25.0))
    monkeypatch.setattr(estimating, "TOP_PS", ())

    def estimate(*flags: str) -> tuple[dict, str]:
        words = ["estimate", "--task", "causal-lm", "--positions", "500", "--json", *flags]
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        return found, format_estimate(TypeAdapter(Estimate).validate_python(found))

    common = ("--teacher", config().teacher, "--dataset", config().data.dataset, "--max-length", "64")
    plain, table = estimate(*common)
    assert [(each["flag"], each["included"]) for each in plain["columns"]] == [
        ("--store-text", False),
        ("--store-label-logprobs", False),
    ]
    texts, logprobs = (each["bytes_per_position"] for each in plain["columns"])
    assert 0 < logprobs <= 2.2
    assert "--store-label-logprobs: " in table
    assert "more, not counted above" in table
    asked, table = estimate(*common, "--store-text")
    assert [each["included"] for each in asked["columns"]] == [True, False]
    assert "counted above" in table
    for one, other in zip(plain["encodings"], asked["encodings"], strict=True):
        assert one["encoding"] == other["encoding"]
        added = other["bytes_per_position"] - one["bytes_per_position"]
        assert added == pytest.approx(texts, rel=0.3, abs=0.2)
    made = run(with_text(config(store_label_logprobs=True)))
    bare = run(config("bare"))
    positions = sum(shard.positions for shard in bare.manifest.shards)
    more = sum(s.bytes for s in made.manifest.shards) - sum(s.bytes for s in bare.manifest.shards)
    assert more / positions == pytest.approx(texts + logprobs, rel=0.5)
    chats, _ = estimate(
        "--teacher", str(teacher), "--dataset", str(teacher.parent / "chats.jsonl"), "--messages-column", "chat"
    )
    assert [each["flag"] for each in chats["columns"]] == ["--store-text", "--store-label-logprobs"]
    packed, _ = estimate(*common, "--packing")
    assert [each["flag"] for each in packed["columns"]] == ["--store-label-logprobs"]
