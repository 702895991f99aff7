"""Logits of padded batches equal those of single rows, with any padding token or none."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch

import pipeline as softlabel
from pipeline.errors import ModelError
from pipeline.records import TokenizedExample
from pipeline.tasks import get_task
from tests.conftest import TINY, tiny_model

TASK = get_task("sequence-classification")
PADS = {"first": 0, "none": None, "eos": 1, "ordinary": 5, "negative": -1, "beyond": 10_000}


def rows():
    """Return rows of 3 to 9 tokens that end with token 0, EOS, 5 or others."""
    rng = np.random.default_rng(0)
    for i, last in enumerate([0, 1, 5, 7, 0, 1, 9]):
        ids = np.append(rng.integers(0, 40, 2 + i % 7), last).astype(np.int32)
        yield TokenizedExample(i, 0, ids, None, None)


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("kind", sorted(set(TINY) - {"cohere"}))
def test_padded_rows_give_the_logits_of_each_alone(kind, pad):
    model = tiny_model(kind, 40, num_labels=3, spread=3.0)
    if kind not in ("bert", "roberta", "distilbert", "modernbert", "deberta-v2"):
        model.config.pad_token_id = PADS[pad]
    before = model.config.pad_token_id
    with torch.inference_mode():
        alone = torch.cat([model(**TASK.collate([row], 0)[0]).logits for row in rows()])
        for fill in (0, 1, 39, 10_000):  # whatever the tokenizer would pad with
            inputs, supervised = TASK.collate(list(rows()), fill)
            found = TASK.gather_logits(model, inputs, supervised)
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    assert model.config.pad_token_id == before


def test_a_batch_that_ends_with_every_token_of_the_vocabulary():
    model = tiny_model("llama", 8, num_labels=3, spread=3.0)
    model.config.pad_token_id = None
    every = [TokenizedExample(i, 0, np.array([3] * (i % 3) + [i], dtype=np.int32), None, None) for i in range(8)]
    with torch.inference_mode():
        alone = torch.cat([model(**TASK.collate([row], 0)[0]).logits for row in every])
        found = TASK.gather_logits(model, *TASK.collate(every, 0))
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_ids_without_an_embedding_are_named_before_the_first_shard(tmp_path, lm_tokenizer, save_teacher, task):
    labels = 2 if task == "sequence-classification" else None
    model = tiny_model("llama", len(lm_tokenizer), num_labels=labels)
    path = save_teacher(model, lm_tokenizer)
    more = type(lm_tokenizer).from_pretrained(path)
    more.add_special_tokens({"pad_token": "[PAD]"})
    more.add_tokens(["<think>"])
    more.save_pretrained(path)
    plain = datasets.Dataset.from_dict({"text": ["the cat", "the dog sat on the mat"]})
    assert len(softlabel.cache_logits(str(path), plain, tmp_path / "fine", task=task).dataset("train")) == 2
    marked = datasets.Dataset.from_dict({"text": ["the cat", "the <think> dog"]})
    with pytest.raises(ModelError, match=rf"that the input embedding lacks.*{len(more) - 1} \('<think>'\)"):
        softlabel.cache_logits(str(path), marked, tmp_path / "refused", task=task)
    assert not list((tmp_path / "refused").rglob("*.parquet"))
    cache = softlabel.cache_logits(str(path), marked, tmp_path / "skipped", task=task, on_bad_row="skip")
    assert len(cache.dataset("train")) == 1


@pytest.mark.parametrize("pad", [None, 1, 5])
def test_a_live_model_keeps_its_padding_token(tmp_path, lm_tokenizer, pad):
    model = tiny_model("llama", len(lm_tokenizer), num_labels=2, spread=3.0)
    model.config.pad_token_id = pad
    texts = ["the cat", "the dog sat on the mat", "old river"]
    cache = softlabel.cache_logits(
        model, datasets.Dataset.from_dict({"text": texts}), tmp_path / "c", task=TASK.name, tokenizer=lm_tokenizer
    )
    assert model.config.pad_token_id == pad
    for text, row in zip(texts, cache.dataset("train"), strict=True):
        with torch.inference_mode():
            expected = model(**lm_tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0]
        torch.testing.assert_close(row.soft.top_logprobs, expected.log_softmax(-1), rtol=1e-3, atol=1e-3)
