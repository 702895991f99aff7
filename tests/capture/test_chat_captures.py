"""Captures of chats with a stock chat template: contract, counts, messages and students."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from datasets import Dataset

import pipeline as softlabel
from pipeline.cache import verify
from pipeline.capture.run import run
from pipeline.cli import main
from pipeline.config import CacheLogitsConfig, DataConfig, chat_template_kwargs, load_config, resolve
from pipeline.errors import BadRowError, ConfigError, ContractError, MisuseError
from pipeline.records import Columns
from tests.conftest import tiny_model
from tests.support.chats import tokenizer_of

CHATS = [
    [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}],
    [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat on"},
        {"role": "user", "content": "on what"},
        {"role": "assistant", "content": "the mat"},
    ],
]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    tokenizer = tokenizer_of("qwen-3")
    tiny_model("llama", len(tokenizer), spread=3.0).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    Dataset.from_dict({"chat": CHATS}).to_json(tmp_path / "chats.jsonl")
    return tmp_path / "teacher"


def config_of(teacher: Path, *, rows_per_shard: int = 1, **data: Any) -> CacheLogitsConfig:
    settings = {"dataset": str(teacher.parent / "chats.jsonl"), "messages_column": "chat", **data}
    return CacheLogitsConfig(
        task="causal-lm",
        data=DataConfig(**settings),
        teacher=str(teacher),
        output=str(teacher.parent / "cache"),
        rows_per_shard=rows_per_shard,
    )


def learnt(cache: Any) -> list[tuple[int, int, str]]:
    return [
        (
            row.example.source_row,
            row.example.piece,
            cache.tokenizer.decode(row.example.input_ids[np.flatnonzero(row.example.supervised) + 1]),
        )
        for row in cache.dataset("train")
    ]


EMPTY = "<think>\n\n</think>\n\n"


def test_a_stock_template_makes_a_row_of_each_context_and_says_so(teacher, caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="pipeline")
    cache = run(config_of(teacher))
    assert learnt(cache) == [
        (0, 0, f"{EMPTY}sat<|im_end|>"),
        (1, 0, f"{EMPTY}sat on<|im_end|>"),
        (1, 1, f"{EMPTY}the mat<|im_end|>"),
    ]
    assert len(cache.manifest.shards) == 2
    assert cache.manifest.contract.tokenization.assistant_turns == "auto"
    assert verify(cache.root).problems == ()
    assert caplog.text.count("chats: the chat template does not mark the assistant's tokens") == 1
    counted = json.loads((cache.root / "reports/contents.json").read_text())
    assert (counted["split_chats"], counted["split_chat_rows"], counted["cut_supervised_rows"]) == (1, 2, 0)
    line = "1 of 2 chats are 2 rows: the chat template rewrites earlier turns"
    assert line in caplog.text
    card = (cache.root / "README.md").read_text()
    assert line in card
    assert "turns of the assistant by rendering the chat up to each" in card
    shown = CliRunner().invoke(main, ["inspect", "--cache", str(cache.root)]).output
    assert "turns of the assistant by rendering the chat up to each" in shown
    again = run(config_of(teacher))  # the same command reopens its cache
    assert again.manifest == cache.manifest
    student = softlabel.init_student(teacher, tmp_path / "student", layers=[0, 1])
    assert np.isfinite(softlabel.evaluate(cache, {"s": student}, split="train").students[0].kl)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"assistant_turns": "each"}, "assistant_turns"),
        ({"assistant_turns": "last"}, "assistant_turns"),
        ({"chat_template_kwargs": ("enable_thinking=false",)}, "chat_template_kwargs"),
        ({"truncation_side": "left"}, "truncation_side"),
    ],
)
def test_another_setting_is_another_capture(teacher, changed, named):
    run(config_of(teacher))
    with pytest.raises(ContractError, match=rf"holds another capture: contract\.tokenization\.{named}"):
        run(config_of(teacher, **changed))


def test_chats_may_be_appended_that_are_several_rows(teacher):
    run(config_of(teacher, rows_per_shard=2))
    Dataset.from_dict({"chat": [*CHATS, CHATS[1]]}).to_json(teacher.parent / "chats.jsonl")
    from dataclasses import replace

    grown = run(replace(config_of(teacher, rows_per_shard=2), append=True))
    assert [key[:2] for key in learnt(grown)] == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert json.loads((grown.root / "reports/contents.json").read_text())["split_chats"] == 2


def test_settings_of_chats_reach_the_capture_from_every_side(teacher, tmp_path):
    """Flags, a YAML file and the Python call give the same contract and the same bytes."""
    caches = []
    flags = [
        "--assistant-turns",
        "last",
        "--chat-template-kwargs",
        "enable_thinking=false",
        "--truncation-side",
        "left",
    ]
    common = ["--task", "causal-lm", "--teacher", str(teacher), "--dataset", str(tmp_path / "chats.jsonl")]
    common += ["--messages-column", "chat", "--max-length", "30"]
    output = tmp_path / "by-flags"
    made = CliRunner().invoke(main, ["cache-logits", *common, *flags, "--output", str(output)])
    assert made.exit_code == 0, made.output
    caches.append(softlabel.Cache.open(output))
    (tmp_path / "c.yaml").write_text(
        "data:\n  assistant-turns: last\n  chat-template-kwargs: {enable_thinking: false}\n  truncation-side: left\n"
    )
    output = tmp_path / "by-file"
    made = CliRunner().invoke(
        main, ["cache-logits", "--config", str(tmp_path / "c.yaml"), *common, "--output", str(output)]
    )
    assert made.exit_code == 0, made.output
    caches.append(softlabel.Cache.open(output))
    caches.append(
        softlabel.cache_logits(
            str(teacher),
            str(tmp_path / "chats.jsonl"),
            tmp_path / "by-call",
            task="causal-lm",
            columns=Columns(text=None, messages="chat"),
            max_length=30,
            assistant_turns="last",
            chat_template_kwargs={"enable_thinking": False},
            truncation_side="left",
        )
    )
    settings = {cache.manifest.contract.tokenization for cache in caches}
    assert len(settings) == 1
    assert settings.pop().chat_template_kwargs == ("enable_thinking=false",)
    assert len({cache.manifest.shards[0].sha256 for cache in caches}) == 1
    assert learnt(caches[0]) == [(0, 0, "sat<|im_end|>"), (1, 0, "the mat<|im_end|>")]
    for flag in flags:
        assert flag in (caches[0].root / "README.md").read_text()  # the card's command line


def test_rows_that_lose_tokens_to_learn_are_counted(teacher, caplog):
    caplog.set_level(logging.INFO, logger="pipeline")
    cache = run(config_of(teacher, assistant_turns="each", max_length=55))
    counted = json.loads((cache.root / "reports/contents.json").read_text())
    assert counted["cut_rows"] >= counted["cut_supervised_rows"] >= 1
    line = "of 2 rows lost tokens to train on (--max-length, --truncation-side)"
    assert line in caplog.text
    assert line in (cache.root / "README.md").read_text()
    assert "rewrites earlier turns" not in caplog.text  # one row per turn was requested


def test_a_chat_that_no_one_row_holds_is_refused_by_its_row(teacher):
    with pytest.raises(BadRowError, match=r"row 1: the chat template rewrites earlier turns.*--assistant-turns all"):
        run(config_of(teacher, assistant_turns="all"))


def test_marks_and_plain_prompts_have_the_contract_that_they_had(teacher, tmp_path):
    marked = tmp_path / "marked.jinja"
    marked.write_text(
        "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    cache = run(config_of(teacher, chat_template=str(marked)))
    text = (cache.root / "manifest.json").read_text()
    assert "assistant_turns" not in text
    assert "chat_template_kwargs" not in text
    assert "truncation_side" not in text
    rows = Dataset.from_dict({"q": ["the cat "], "a": ["sat on"]})
    columns = Columns(text=None, prompt="q", completion="a")
    model, tokenizer = tiny_model("llama", len(tokenizer_of("qwen-3"))), tokenizer_of("qwen-3")
    plain = softlabel.cache_logits(
        model, rows, tmp_path / "plain", task="causal-lm", tokenizer=tokenizer, columns=columns
    )
    assert "assistant_turns" not in (plain.root / "manifest.json").read_text()


def test_arguments_of_a_template_have_one_form():
    assert chat_template_kwargs(["b=x", "a=false", "c=True", "d=3", 'e="3"', "f="]) == (
        "a=false",
        'b="x"',
        "c=true",
        "d=3",
        'e="3"',
        'f=""',
    )
    for items, message in (
        (["a"], "expected KEY=VALUE, found 'a'"),
        (["a=1", "a=2"], "a: is given twice"),
        (["tools=1"], "tools: is what the pipeline gives"),
    ):
        with pytest.raises(MisuseError, match=message):
            chat_template_kwargs(items)
    with pytest.raises(MisuseError, match="assistant_turns: expected one of auto, all, each, last, found 'some'"):
        softlabel.cache_logits(
            tiny_model("llama", len(tokenizer_of("phi-4"))),
            Dataset.from_dict({"chat": CHATS}),
            "nowhere",
            task="causal-lm",
            tokenizer=tokenizer_of("phi-4"),
            columns=Columns(text=None, messages="chat"),
            assistant_turns="some",
        )


def test_a_yaml_file_keeps_the_types_of_arguments(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "task: causal-lm\ndata:\n  dataset: d\n  messages-column: chat\n"
        '  chat-template-kwargs: {enable_thinking: false, day: "2024", list: [1, a], nothing: null}\n'
        "cache-logits: {teacher: t, output: o}\n"
    )
    file = load_config(tmp_path / "c.yaml")
    config = resolve(CacheLogitsConfig, file, file.sections["cache-logits"][0], {})
    assert config.data.tokenization(9).chat_template_kwargs == (
        'day="2024"',
        "enable_thinking=false",
        'list=[1, "a"]',
        "nothing=null",
    )
    with pytest.raises(ConfigError, match="assistant-turns"):
        resolve(CacheLogitsConfig, file, file.sections["cache-logits"][0], {"assistant_turns": "some"})
