"""Captures of chats, prompts with completions, and token ids."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset

import pipeline as softlabel
from pipeline.cache import verify
from pipeline.capture.run import run
from pipeline.config import CacheLogitsConfig, DataConfig
from pipeline.errors import MisuseError
from pipeline.records import Columns
from tests.conftest import tiny_model

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %} {% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}],
    [
        {"role": "system", "content": "old and new"},
        {"role": "user", "content": "who ran"},
        {"role": "assistant", "content": "the dog"},
        {"role": "user", "content": "and then"},
        {"role": "assistant", "content": "ran home"},
    ],
]


def direct_nll(model, row) -> float:
    """The summed -log p of the tokens after the supervised positions, from a plain forward pass."""
    ids = torch.from_numpy(row.example.input_ids.astype(np.int64))
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1)
    positions = torch.from_numpy(np.flatnonzero(row.example.supervised))
    return -float(logprobs[positions, ids[positions + 1]].sum())


@pytest.mark.parametrize("by_flag", [True, False])
def test_chats_supervise_the_assistant_and_the_teachers_nll_is_theirs(tmp_path, lm_tokenizer, save_teacher, by_flag):
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0)
    tokenizer = copy.deepcopy(lm_tokenizer)
    if by_flag:
        (tmp_path / "template.jinja").write_text(TEMPLATE)
    else:
        tokenizer.chat_template = TEMPLATE
    path = save_teacher(model, tokenizer)
    Dataset.from_dict({"chat": CHATS}).to_json(tmp_path / "chats.jsonl")
    data = DataConfig(
        dataset=str(tmp_path / "chats.jsonl"),
        messages_column="chat",
        chat_template=str(tmp_path / "template.jinja") if by_flag else None,
    )
    cache = run(CacheLogitsConfig(task="causal-lm", data=data, teacher=str(path), output=str(tmp_path / "c")))
    assert cache.manifest.contract.tokenizer.chat_template_sha256 is not None
    said = []
    for row in cache.dataset("train"):
        tokens = row.example.input_ids[np.flatnonzero(row.example.supervised) + 1].tolist()
        said.append(cache.tokenizer.decode(tokens))
        assert row.teacher_nll_sum == pytest.approx(direct_nll(model, row), rel=1e-4)
    assert said == ["sat on the mat<eos>", "the dog<eos>ran home<eos>"]
    assert verify(cache.root).problems == ()
    student = softlabel.init_student(path, tmp_path / "s", layers=[0, 1])  # its tokenizer may have another template
    assert np.isfinite(softlabel.evaluate(cache, {"s": student}, split="train").students[0].kl)


@pytest.mark.parametrize(
    ("rows", "columns", "predicted"),
    [
        ({"q": ["the cat "], "a": ["sat on"]}, Columns(text=None, prompt="q", completion="a"), "sat on<eos>"),
        (
            {"ids": [[70, 71, 72, 73]], "labels": [[-100, -100, 72, 73]]},
            Columns(text=None, input_ids="ids", labels="labels"),
            None,
        ),
    ],
)
def test_prompts_and_token_ids(tmp_path, lm_tokenizer, rows, columns, predicted):
    model = tiny_model("gpt2", len(lm_tokenizer), spread=3.0)
    cache = softlabel.cache_logits(
        model, Dataset.from_dict(rows), tmp_path / "c", task="causal-lm", tokenizer=lm_tokenizer, columns=columns
    )
    row = cache.dataset("train")[0]
    tokens = row.example.input_ids[np.flatnonzero(row.example.supervised) + 1].tolist()
    assert lm_tokenizer.decode(tokens) == predicted if predicted else tokens == [72, 73]
    assert row.teacher_nll_sum == pytest.approx(direct_nll(model, row), rel=1e-4)


def test_a_device_map_places_the_teacher(tmp_path, lm_tokenizer, documents, save_teacher):
    path = save_teacher(tiny_model("llama", len(lm_tokenizer), spread=3.0), lm_tokenizer)
    documents["test"].to_json(tmp_path / "d.jsonl")
    data = DataConfig(dataset=str(tmp_path / "d.jsonl"), max_length=32)
    settings = {"task": "causal-lm", "data": data, "teacher": str(path)}
    plain = run(CacheLogitsConfig(**settings, output=str(tmp_path / "plain")))
    mapped = run(CacheLogitsConfig(**settings, output=str(tmp_path / "mapped"), device_map="auto"))
    assert [s.sha256 for s in plain.manifest.shards] == [s.sha256 for s in mapped.manifest.shards]


def test_packing_needs_an_eos(tmp_path, lm_tokenizer, documents):
    tokenizer = copy.deepcopy(lm_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(MisuseError, match="the tokenizer has none"):
        softlabel.cache_logits(
            tiny_model("gpt2", len(tokenizer)),
            documents,
            tmp_path / "c",
            task="causal-lm",
            tokenizer=tokenizer,
            packing=True,
        )
