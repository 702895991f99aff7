"""Prompts that are made from rows, and the error lines for rows without a prompt."""

from __future__ import annotations

import json

import datasets
import pytest
from datasets import Dataset

from pipeline.config import GenerateConfig
from pipeline.errors import BadRowError, MisuseError, PipelineError, SourceError
from pipeline.generation.job import prepare
from pipeline.generation.run import run
from pipeline.records import BadRow
from tests.conftest import WORDS
from tests.support.generations import config, writing_model  # noqa: F401 - a fixture

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]


@pytest.fixture
def chat_tokenizer(lm_tokenizer):
    before = lm_tokenizer.chat_template, lm_tokenizer.bos_token
    lm_tokenizer.chat_template, lm_tokenizer.bos_token = TEMPLATE, "<eos>"
    yield lm_tokenizer
    lm_tokenizer.chat_template, lm_tokenizer.bos_token = before


@pytest.fixture
def write(tmp_path, lm_tokenizer, save_teacher):
    """A function that writes rows to a file and returns the configuration that reads them."""
    writer = save_teacher(writing_model(len(lm_tokenizer)), lm_tokenizer, "w")

    def make(lines, **settings):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        lm_tokenizer.save_pretrained(writer)
        return GenerateConfig(
            **{
                "model": str(writer),
                "dataset": str(tmp_path / "rows.jsonl"),
                "output": str(tmp_path / "out"),
                "max_new_tokens": 4,
                **settings,
            }
        )

    return make


def prompts_of(settings):
    job = prepare(settings)
    shard = job.plan.shards[0]
    return list(job.prompts.read(shard.split, shard.start, shard.stop)), job


def test_texts_are_prompts_as_they_stand(write, lm_tokenizer):
    (first, second), job = prompts_of(write([{"prompt": "the cat"}, {"prompt": "a dog "}]))
    assert (first.text, second.text) == ("the cat", "a dog ")
    assert first.input_ids.tolist() == lm_tokenizer("the cat")["input_ids"]
    assert job.plan.contract.prompts.kind == "texts"


def test_a_text_is_a_turn_of_the_user_where_that_is_asked_for(write, chat_tokenizer, caplog):
    rendered = "<eos><user> the cat<eos><assistant> "
    (first,), job = prompts_of(write([{"question": "the cat"}], prompt_column="question", as_chat=True))
    assert first.text == rendered
    assert first.input_ids.tolist() == chat_tokenizer(rendered, add_special_tokens=False)["input_ids"]
    with caplog.at_level("INFO", "pipeline"):
        (plain,), _ = prompts_of(write([{"prompt": "the cat"}], output=f"{job.layout.root}-plain"))
    assert plain.text == "the cat"
    assert "the tokenizer has a chat template: --as-chat makes each a turn of the user" in caplog.text


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_chats_are_rendered_up_to_where_the_assistant_writes(write, chat_tokenizer, column):
    rows = [
        {column: CHAT},
        {column: CHAT[:1]},
        {column: [*CHAT, {"role": "user", "content": "why"}]},
        {column: CHAT[1:]},
    ]
    found, job = prompts_of(write(rows))
    assert [item.text for item in found[:3]] == [
        "<eos><user> the cat<eos><assistant> ",
        "<eos><user> the cat<eos><assistant> ",
        "<eos><user> the cat<eos><assistant> sat<eos><user> why<eos><assistant> ",
    ]
    assert isinstance(found[3], BadRow)
    assert "expected a turn before the assistant's, found none" in found[3].reason
    assert job.plan.contract.prompts.kind == "chats"


def test_the_first_tokens_of_a_corpus(write, lm_tokenizer, tmp_path):
    """Shorter texts are skipped and counted for every --on-bad-row."""
    texts = [" ".join(WORDS[i : i + 12]) for i in range(6)] + ["a"]
    found = run(write([{"text": text} for text in texts], prefix_tokens=5))
    rows = datasets.load_dataset(str(found.root), split="train").to_list()
    assert [row["source_row"] for row in rows] == list(range(6))
    for row, text in zip(rows, texts, strict=False):
        assert row["input_ids"][:5] == lm_tokenizer(text)["input_ids"][:5]
        assert row["prompt_tokens"] == 5
        assert text.startswith(row["prompt"])
    assert (found.counts.short_rows, found.counts.rows_set_aside) == (1, 0)
    assert "texts shorter than a prompt" in (found.root / "README.md").read_text()


def test_columns_that_are_kept(write):
    found = run(write([{"prompt": "the cat", "id": "a7", "n": 3}], keep_column=("id", "n"), num_samples=2))
    rows = datasets.load_dataset(str(found.root), split="train").to_list()
    assert [(row["id"], row["n"], row["sample"]) for row in rows] == [("a7", 3, 0), ("a7", 3, 1)]
    with pytest.raises(MisuseError, match="--keep-column sample: a generated data set has a column of this name"):
        prepare(write([{"prompt": "the cat", "sample": 1}], keep_column=("sample",), overwrite=True))


def test_a_prompt_that_is_too_long_is_a_line_or_set_aside(write):
    rows = [{"prompt": "the cat"}, {"prompt": "the " * 400}, {"prompt": ""}]
    with pytest.raises(
        BadRowError,
        match=r"rows.jsonl: split train, row 1: a prompt of \d+ tokens and 4 new ones .* 128; correct the row",
    ):
        run(write(rows))
    found = run(write(rows, on_bad_row="skip", overwrite=True))
    assert found.counts.completions == 1
    assert found.counts.rows_set_aside == 2
    lines = (found.root / "reports" / "bad-rows.tsv").read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines] == [["train", "1"], ["train", "2"]]
    assert lines[1].endswith("prompt is empty")


@pytest.mark.parametrize(
    ("rows", "settings", "line"),
    [
        (
            [{"question": "a"}],
            {},
            r"no column 'prompt' or 'messages'; found question; name the column with --prompt-column",
        ),
        ([{"question": "a"}], {"prompt_column": "questions"}, r"no column 'questions'; found question"),
        ([{"prompt": 3}], {}, r"column 'prompt' .*: expected"),
        (
            [{"messages": CHAT}],
            {"as_chat": True},
            r"--as-chat needs prompts that are text, and the column 'messages'",
        ),
        (
            [{"prompt": "a"}],
            {"chat_template_kwargs": ("x=1",)},
            r"--chat-template-kwargs goes with chats, or with --as-chat",
        ),
        ([{"messages": CHAT}], {}, r"the tokenizer has no chat template; give one with --chat-template"),
        ([{"prompt": "a"}], {"rows": "5:9"}, r"--rows 5:9: no split has such rows"),
    ],
)
def test_what_holds_no_prompts_is_a_line(write, rows, settings, line):
    with pytest.raises(PipelineError, match=line):
        run(write(rows, **settings))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"dataset": None}, "missing --dataset, the prompts; or --template"),
        ({"temperature": 0, "num_samples": 2}, "all 2 samples of a prompt would be the same"),
        ({"temperature": 0, "top_p": 0.9}, "--top-p goes with draws"),
        ({"temperature": -1}, "--temperature: expected at least 0, found -1"),
        ({"top_p": 0.0}, r"--top-p: expected a share in \(0, 1\]"),
        ({"min_p": 1.5}, r"--min-p: expected a share in \(0, 1\]"),
        ({"top_k": 0}, "--top-k: expected at least 1"),
        ({"max_new_tokens": 0}, "--max-new-tokens: expected at least 1"),
        ({"stop": ("",)}, "--stop: expected a text, found an empty one"),
        (
            {"prompt_column": "a", "prefix_tokens": 3},
            "one kind of prompt at a time: found --prompt-column and --prefix",
        ),
        ({"text_column": "body"}, "--text-column goes with --prefix-tokens"),
        ({"label": ("a",)}, "--label, --num-examples and --shots go with --template"),
        ({"template": "x"}, "--template needs --num-examples"),
        ({"template": "x", "num_examples": 3, "dataset": None}, "--template needs the labels"),
        ({"template": "x", "num_examples": 3, "dataset": None, "label": ("a", "a")}, "expected each label once"),
        ({"template": "x", "num_examples": 3, "dataset": None, "label": ("a",), "shots": 2}, "--shots needs --dataset"),
        (
            {"template": "x", "num_examples": 3, "prompt_column": "a"},
            "--template makes the prompts itself; drop --prompt",
        ),
        ({"drop": ("none", "cut")}, "--drop none cannot be combined"),
        ({"part": "0/2", "overwrite": True}, "--part with --overwrite"),
        ({"part": "2/2"}, "--part: expected I/N"),
        ({"server_model": "m"}, "--server-model and --concurrency go with --server"),
        ({"server": ("http://x",), "dtype": "float16"}, "--dtype goes with a local model"),
    ],
)
def test_settings_that_contradict_each_other_are_a_line(settings, line):
    with pytest.raises(MisuseError, match=line):
        GenerateConfig(**{"model": "m", "dataset": "d", "output": "o", **settings})


def test_data_in_memory_of_another_kind(lm_tokenizer, tmp_path):
    import pipeline as softlabel

    model = writing_model(len(lm_tokenizer))
    with pytest.raises(MisuseError, match="a list of prompts holds texts"):
        softlabel.generate(model, [{"prompt": "a"}], tmp_path / "o", tokenizer=lm_tokenizer)
    with pytest.raises(SourceError, match="in-memory: no column 'prompt' or 'messages'; found text"):
        softlabel.generate(model, Dataset.from_dict({"text": ["a"]}), tmp_path / "o", tokenizer=lm_tokenizer)


def test_prompts_that_run_out_are_told(config, caplog):
    """A warning names --rows that go beyond the longest split, but not beyond a shorter one."""
    prepare(config(rows="2:10"), dry_run=True)
    assert "--rows" not in caplog.text
    prepare(config(rows="10:30"), dry_run=True)
    assert "--rows 10:30: split train has 14 rows, so that there are 4 prompts instead of 20" in caplog.text
