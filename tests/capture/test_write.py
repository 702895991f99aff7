"""`write_cache`: caches of logits that the caller provides."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import pipeline as softlabel
from pipeline.cache import verify
from pipeline.capture import write
from pipeline.errors import BadRowError, ContractError, EncodingError, MisuseError
from pipeline.records import Full, Sampled, TopK
from pipeline.softlabels import encode, teacher_scores


def token_rows(count: int = 30, classes: int = 320, shift: int = 0):
    generator = torch.Generator().manual_seed(0)
    for n in range(count):
        ids = torch.randint(2, 12, (40,), generator=generator)  # few words, as in real text
        logits = torch.randn(39, classes, generator=generator)
        logits[torch.arange(39), ids[1:]] += 6.0
        yield softlabel.LabelledRow(ids.roll(shift).tolist(), logits=logits, split="train" if n < 25 else "test")


@pytest.mark.parametrize("encoding", [Full(), TopK(4), Sampled(10.0)], ids=lambda e: e.kind)
def test_dense_logits_are_encoded_as_they_come(tmp_path, lm_tokenizer, encoding):
    cache = softlabel.write_cache(
        token_rows(),
        tmp_path / "c",
        task="causal-lm",
        tokenizer=lm_tokenizer,
        encoding=encoding,
        teacher="ensemble",
        rows_per_shard=10,
    )
    assert verify(cache.root).problems == ()
    assert cache.splits == ("train", "test")
    assert cache.manifest.probe.verdict == "aligned"
    for row, given in zip(cache.dataset("train"), token_rows(25), strict=True):
        assert row.example.input_ids.tolist() == given.input_ids
        labels = torch.tensor(given.input_ids[1:])
        assert row.teacher_nll_sum == pytest.approx(float(teacher_scores(given.logits, labels).nll.sum()), rel=1e-4)
    if encoding == TopK(4):
        torch.testing.assert_close(row.soft.top_ids, encode(given.logits, encoding).top_ids)


def test_soft_labels_are_taken_as_they_are(tmp_path, lm_tokenizer):
    rows = [softlabel.LabelledRow(r.input_ids, soft_labels=encode(r.logits, TopK(3))) for r in token_rows(4)]
    cache = softlabel.write_cache(
        rows, tmp_path / "c", task="causal-lm", tokenizer=lm_tokenizer, encoding=TopK(3), teacher="t"
    )
    assert torch.equal(cache.dataset("train")[2].soft.top_ids, rows[2].soft_labels.top_ids)


def test_classifiers_too(tmp_path, bert_tokenizer):
    texts = ["the cat sat", "the dog ran", "a bird flew"]
    rows = [
        softlabel.LabelledRow(bert_tokenizer(t)["input_ids"], logits=torch.randn(1, 2), label=i % 2, text=t)
        for i, t in enumerate(texts)
    ]
    cache = softlabel.write_cache(
        rows,
        tmp_path / "c",
        task="sequence-classification",
        tokenizer=bert_tokenizer,
        encoding=Full(),
        teacher="t",
        label_names=("no", "yes"),
    )
    assert [row.example.text for row in cache.dataset("train")] == texts
    assert [row.example.label for row in cache.dataset("train")] == [0, 1, 0]


@pytest.mark.parametrize("shift", [1, -1])
def test_logits_that_are_off_by_one_are_refused(tmp_path, lm_tokenizer, shift):
    with pytest.raises(ContractError, match="not aligned with their tokens"):
        softlabel.write_cache(
            token_rows(60, shift=shift),
            tmp_path / "c",
            task="causal-lm",
            tokenizer=lm_tokenizer,
            encoding=TopK(320),
            teacher="t",
        )
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_a_stopped_run_starts_anew_and_a_finished_cache_stays(tmp_path, lm_tokenizer):
    def stops():
        yield from token_rows(12)
        raise KeyboardInterrupt

    settings = {
        "task": "causal-lm",
        "tokenizer": lm_tokenizer,
        "encoding": TopK(4),
        "teacher": "t",
        "rows_per_shard": 5,
    }
    with pytest.raises(KeyboardInterrupt):
        softlabel.write_cache(stops(), tmp_path / "c", **settings)
    assert not (tmp_path / "c" / "manifest.json").exists()
    cache = softlabel.write_cache(token_rows(7), tmp_path / "c", **settings)
    assert len(cache.dataset("train")) == 7
    assert verify(cache.root).problems == ()
    with pytest.raises(MisuseError, match="finished cache"):
        softlabel.write_cache(token_rows(7), tmp_path / "c", **settings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (softlabel.LabelledRow([1, 2, 3]), "row 0: expected logits or soft_labels"),
        (
            softlabel.LabelledRow([1, 2, 3], logits=torch.zeros(3, 320)),
            r"row 0: expected logits of shape \(2, 320\), found \(3, 320\)",
        ),
        (
            softlabel.LabelledRow([1, 2, 3], logits=torch.full((2, 320), torch.nan)),
            "row 0: position 0: expected finite logits, found NaN",
        ),
        (softlabel.LabelledRow([1, 2, 3], logits=torch.zeros(3, 320), supervised=[True] * 3), "row 0: supervised"),
        (softlabel.LabelledRow([1, 2, 3], soft_labels=encode(torch.zeros(2, 320), TopK(5))), "row 0: expected TopK"),
    ],
)
def test_rows_whose_parts_do_not_fit(tmp_path, lm_tokenizer, row, message):
    with pytest.raises(BadRowError, match=message):
        softlabel.write_cache(
            [row], tmp_path / "c", task="causal-lm", tokenizer=lm_tokenizer, encoding=TopK(4), teacher="t"
        )


@pytest.mark.parametrize("encoding", [Full(), TopK(4), Sampled(10.0)], ids=lambda e: e.kind)
def test_batches_change_no_byte(tmp_path, lm_tokenizer, encoding, monkeypatch):
    def rows():  # two dtypes, different lengths
        for n, row in enumerate(token_rows()):
            cut = 40 - n % 3
            logits = row.logits[: cut - 1].to(torch.float64 if 10 <= n < 14 else torch.float32)
            yield dataclasses.replace(row, input_ids=row.input_ids[:cut], logits=logits)

    def hashes(name):
        settings = {"task": "causal-lm", "tokenizer": lm_tokenizer, "encoding": encoding, "teacher": "t"}
        return [s.sha256 for s in softlabel.write_cache(rows(), tmp_path / name, **settings).manifest.shards]

    whole = hashes("whole")
    monkeypatch.setattr(write, "_BATCH_LOGITS", 3 * 39 * 320)
    assert hashes("threes") == whole
    monkeypatch.setattr(write, "_BATCH_LOGITS", 1)
    assert hashes("ones") == whole


def test_a_bad_row_among_good_ones_is_the_first_that_is_named_or_is_set_aside_alone(tmp_path, lm_tokenizer):
    rows = list(token_rows(9))
    rows[3] = dataclasses.replace(rows[3], logits=rows[3].logits.fill_(torch.inf))
    rows[6] = dataclasses.replace(rows[6], logits=rows[6].logits[1:])
    settings = {"task": "causal-lm", "tokenizer": lm_tokenizer, "encoding": TopK(4), "teacher": "t"}
    with pytest.raises(BadRowError, match="row 3: position 0: expected finite logits"):
        softlabel.write_cache(rows, tmp_path / "stop", **settings)
    cache = softlabel.write_cache(rows, tmp_path / "skip", on_bad_row="skip", **settings)
    assert [row.example.source_row for row in cache.dataset("train")] == [0, 1, 2, 4, 5, 7, 8]
    assert cache.manifest.bad_rows == 2


def test_columns_to_copy_are_stored_as_text(tmp_path, bert_tokenizer):
    row = softlabel.LabelledRow([2, 5, 3], logits=np.zeros((1, 2)), kept={"id": 7, "score": 0.5, "note": None})
    cache = softlabel.write_cache(
        [row], tmp_path / "cache", task="sequence-classification", tokenizer=bert_tokenizer, encoding=Full(),
        label_names=("a", "b"), teacher="t",
    )  # fmt: skip
    assert cache.dataset("train")[0].example.kept == {"id": "7", "score": "0.5", "note": None}


def test_an_encoding_is_no_name(tmp_path, lm_tokenizer):
    expected = r"encoding: expected Full\(\), TopK\(\.\.\.\), .*, found 'full'"
    with pytest.raises(MisuseError, match=expected):
        softlabel.write_cache(
            [], tmp_path / "a", task="causal-lm", tokenizer=lm_tokenizer, encoding="full", teacher="t"
        )
    with pytest.raises(MisuseError, match=expected):
        softlabel.cache_logits("teacher", "data", tmp_path / "b", task="causal-lm", encoding="full")


def test_no_rows_and_no_classes(tmp_path, lm_tokenizer):
    with pytest.raises(MisuseError, match="found none"):
        softlabel.write_cache(
            [], tmp_path / "c", task="causal-lm", tokenizer=lm_tokenizer, encoding=TopK(4), teacher="t"
        )
    with pytest.raises(MisuseError, match="label_names"):
        softlabel.write_cache(
            [], tmp_path / "c", task="sequence-classification", tokenizer=lm_tokenizer, encoding=Full(), teacher="t"
        )


@pytest.mark.parametrize(
    ("ids", "logprobs"),
    [([[1, 1]], [[-1.0, -1.0]]), ([[1, 9]], [[-1.0, -1.0]]), ([[1, 2]], [[0.0, -0.1]]), ([[]], [[]])],
)
def test_top_log_probabilities_that_are_no_distribution(ids, logprobs):
    with pytest.raises(EncodingError, match="position 0"):
        softlabel.top_soft_labels(ids, logprobs, 9, k=2)


def test_ready_labels_of_sampled_are_rounded_without_bias(tmp_path, lm_tokenizer):
    """An exact top probability of 0.044 is rounded up in some rows and down in others."""
    logits = torch.full((1, 320), -20.0)
    logits[0, :3] = torch.tensor([0.9, 0.044, 0.056]).log()
    rows = (
        softlabel.LabelledRow(input_ids=[1, 2], soft_labels=softlabel.encode(logits, Sampled(25.0))) for _ in range(600)
    )
    cache = softlabel.write_cache(
        rows, tmp_path / "c", task="causal-lm", tokenizer=lm_tokenizer, encoding=Sampled(25.0), teacher="t"
    )
    weights = np.asarray([float(row.soft.top_logprobs[-1].exp()) for row in cache.dataset("train")])
    q = float(torch.softmax(logits, -1)[0, 1])
    assert set(np.round(weights * 80).astype(int)) == {3, 4}
    assert abs(weights.mean() - q) < 4 * weights.std() / np.sqrt(len(weights))


def settings_of(tokenizer, encoding, **more):
    return {"task": "causal-lm", "tokenizer": tokenizer, "encoding": encoding, "teacher": "t", **more}


@pytest.mark.parametrize("encoding", [Full(), TopK(4), Sampled(10.0, temperature=2.0)], ids=lambda e: e.kind)
def test_the_log_probability_of_each_next_token_is_kept_on_request(tmp_path, lm_tokenizer, encoding):
    settings = settings_of(lm_tokenizer, encoding, store_label_logprobs=True)
    cache = softlabel.write_cache(token_rows(6), tmp_path / "c", **settings)
    assert verify(cache.root).problems == ()
    for row, given in zip(cache.dataset("train"), token_rows(6), strict=True):
        expected = -teacher_scores(given.logits, torch.tensor(given.input_ids[1:])).nll
        torch.testing.assert_close(row.label_logprobs, expected, atol=1e-3, rtol=1e-3)


def test_a_row_where_it_is_not_known_is_a_bad_row(tmp_path, lm_tokenizer):
    def ready(encoding, *, scored=False):
        for given in token_rows(4):
            soft, labels = encode(given.logits, encoding), torch.tensor(given.input_ids[1:])
            scores = teacher_scores(given.logits, labels) if scored else None
            yield softlabel.LabelledRow(given.input_ids, soft_labels=soft, scores=scores)

    rows = list(ready(TopK(320)))
    rows[2] = list(ready(TopK(320)))[2]
    near = encode(torch.eye(320)[:39], TopK(1))  # the most likely are 0, 1, 2, ..., not the next tokens
    rows[2] = softlabel.LabelledRow(rows[2].input_ids, soft_labels=dataclasses.replace(near, encoding=TopK(320)))
    settings = settings_of(lm_tokenizer, TopK(320), store_label_logprobs=True)
    message = (
        r"row 2: label_logprobs: the log-probability of the token that follows is not known at \d+ of 39 positions"
    )
    with pytest.raises(BadRowError, match=message):
        softlabel.write_cache(rows, tmp_path / "c", **settings)
    made = softlabel.write_cache(rows, tmp_path / "d", on_bad_row="skip", **settings)
    assert [row.example.source_row for row in made.dataset("train")] == [0, 1, 3]
    assert made.manifest.bad_rows == 1
    settings = settings_of(lm_tokenizer, Sampled(10.0), store_label_logprobs=True)
    with pytest.raises(BadRowError, match=r"row 0: label_logprobs: .* not known at 39 of 39 positions"):
        softlabel.write_cache(ready(Sampled(10.0)), tmp_path / "e", **settings)
    made = softlabel.write_cache(ready(Sampled(10.0), scored=True), tmp_path / "f", **settings)
    assert made.dataset("train")[0].label_logprobs.shape == (39,)


def test_texts_and_messages_are_kept_on_request(tmp_path, lm_tokenizer):
    def rows(**fields):
        return [dataclasses.replace(row, **fields) for row in token_rows(3)]

    settings = settings_of(lm_tokenizer, TopK(4))
    chat = '{"messages": [{"role": "assistant", "content": "hi"}], "tools": null, "learnt": [0]}'
    for name, fields in (("text", {"text": "the cat"}), ("messages", {"messages": chat})):
        made = softlabel.write_cache(rows(**fields), tmp_path / name, store_text=True, **settings)
        assert getattr(made.dataset("train")[0].example, name) == fields[name]
        assert made.manifest.contract.store_text
        assert verify(made.root).problems == ()
        plain = softlabel.write_cache(rows(**fields), tmp_path / f"{name}-plain", **settings)
        assert name not in plain.manifest.contract.columns
    with pytest.raises(MisuseError, match="store_text: expected rows with text or messages, found none"):
        softlabel.write_cache(rows(), tmp_path / "x", store_text=True, **settings)
    with pytest.raises(MisuseError, match="messages are of language models, in place of text"):
        softlabel.write_cache(rows(text="a", messages=chat), tmp_path / "x", store_text=True, **settings)
