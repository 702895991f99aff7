"""A cache with wrong text_bytes is reported before its bits per byte are used."""

from __future__ import annotations

import dataclasses
import logging

import pytest

import pipeline as softlabel
from pipeline.evaluation.text_bytes import warn_of_text_bytes
from tests.conftest import tiny_model


def test_a_fresh_cache_passes_and_one_that_counts_otherwise_is_named(
    tmp_path, lm_tokenizer, documents, caplog, monkeypatch
):
    model = tiny_model("llama", len(lm_tokenizer))
    cache = softlabel.cache_logits(model, documents, tmp_path / "c", task="causal-lm", tokenizer=lm_tokenizer)
    with caplog.at_level(logging.WARNING, "pipeline"):
        warn_of_text_bytes(cache, "test")
    assert "text_bytes" not in caplog.text
    rows = list(cache.dataset("test"))
    wrong = [
        dataclasses.replace(row, example=dataclasses.replace(row.example, text_bytes=3 * row.example.text_bytes))
        for row in rows
    ]
    monkeypatch.setattr(type(cache), "dataset", lambda self, split: wrong)
    with caplog.at_level(logging.WARNING, "pipeline"):
        warn_of_text_bytes(cache, "test")
    stated = sum(row.example.text_bytes for row in wrong)
    assert f"split test: text_bytes is {stated} for rows whose tokens have {stated // 3} bytes" in caplog.text


@pytest.mark.parametrize("kind", ["prompt", "chat"])
def test_other_kinds_of_input_pass_too(tmp_path, lm_tokenizer, caplog, kind):
    from datasets import Dataset

    from pipeline.records import Columns

    model = tiny_model("llama", len(lm_tokenizer))
    if kind == "prompt":
        rows, columns = {"p": ["the cat", "a dog"], "c": [" sat", "ran home"]}, Columns(prompt="p", completion="c")
    else:
        turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on \U0001f600"}]
        rows, columns = {"m": [turns, turns]}, Columns(messages="m")
        lm_tokenizer = type(lm_tokenizer)(tokenizer_object=lm_tokenizer.backend_tokenizer, eos_token="<eos>")
        lm_tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
            "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        )
    cache = softlabel.cache_logits(
        model, Dataset.from_dict(rows), tmp_path / "c", task="causal-lm", tokenizer=lm_tokenizer, columns=columns
    )
    with caplog.at_level(logging.WARNING, "pipeline"):
        warn_of_text_bytes(cache, "train")
    assert "text_bytes" not in caplog.text
