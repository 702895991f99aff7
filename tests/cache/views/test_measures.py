"""The measures of a split equal those that plain NumPy computes from its columns."""

from __future__ import annotations

import numpy as np
import pytest

import pipeline as softlabel
from pipeline.cache.views import measures
from pipeline.cache.views.measures import measure
from pipeline.errors import CacheError
from pipeline.records import NO_LABEL, Full, Sampled, TopK, TopP
from tests.support.rows import build_cache

ENCODINGS = [Full(), TopK(4), TopP(0.7), Sampled(6.0)]


def column(cache, split, name):
    return [value for table in cache.dataset(split).tables([name]) for value in table.column(0).to_pylist()]


def first_ids(cache, split):
    """The teacher's most likely class at each position, from the columns."""
    contract = cache.manifest.contract
    if isinstance(contract.encoding, Full):
        rows = [np.asarray(row).reshape(-1, contract.num_classes) for row in column(cache, split, "logits")]
        return np.concatenate([row.argmax(1) for row in rows])
    found = []
    for counts, row in zip(column(cache, split, "top_count"), column(cache, split, "top_ids"), strict=True):
        found += [row[start] for start in np.cumsum([0, *counts])[:-1]]
    return np.asarray(found)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.kind)
def test_a_classifiers_split(tmp_path, bert_tokenizer, encoding):
    cache = build_cache(
        tmp_path / "c", bert_tokenizer, encoding=encoding, classes=7, tokens=False, splits=("train", "test")
    )
    found = measure(cache, "test")
    labels = np.asarray([NO_LABEL if each is None else each for each in column(cache, "test", "label")])
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.predicted, first_ids(cache, "test"))
    np.testing.assert_array_equal(found.lengths, [len(ids) for ids in column(cache, "test", "input_ids")])
    assert (found.rows, found.positions) == (60, 60)
    if isinstance(encoding, Full):
        logits = np.asarray(column(cache, "test", "logits"), dtype=np.float64)
        q = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(found.entropy, -(q * np.log(q)).sum(1), rtol=1e-5)
        np.testing.assert_allclose(found.confidence, q.max(1), rtol=1e-5)
        assert len(found.kept_mass) == len(found.kept_classes) == 0
        known = labels != NO_LABEL
        places = 1 + (q > q[np.arange(60), np.where(known, labels, 0)][:, None]).sum(1)
        np.testing.assert_array_equal(found.ranks, np.where(known, places, -1))
        return
    np.testing.assert_allclose(found.entropy, column(cache, "test", "teacher_entropy_sum"), rtol=1e-6)
    tails = column(cache, "test", "tail_count") if isinstance(encoding, Sampled) else [[0]] * 60
    counts = column(cache, "test", "top_count")
    np.testing.assert_array_equal(found.kept_classes, [a[0] + b[0] for a, b in zip(counts, tails, strict=True)])
    if isinstance(encoding, Sampled):
        weights = [np.asarray(row) / encoding.steps for row in column(cache, "test", "top_weights")]
        np.testing.assert_allclose(found.confidence, [row[0] for row in weights], rtol=1e-6)
    else:
        weights = [np.exp(np.asarray(row, dtype=np.float64)) for row in column(cache, "test", "top_logprobs")]
        np.testing.assert_allclose(found.confidence, [row[0] for row in weights], atol=2e-3)
    np.testing.assert_allclose(found.kept_mass, [row.sum() for row in weights], atol=5e-3)
    for label, ids, rank in zip(labels.tolist(), column(cache, "test", "top_ids"), found.ranks.tolist(), strict=True):
        assert rank == (-1 if label == NO_LABEL else ids.index(label) + 1 if label in ids else 0)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.kind)
def test_the_most_confident_disagreements_are_the_labelled_rows_that_it_says(tmp_path, bert_tokenizer, encoding):
    cache = build_cache(tmp_path / "c", bert_tokenizer, encoding=encoding, classes=7, tokens=False)
    found = measure(cache, "train")
    wrong = np.flatnonzero((found.labels != NO_LABEL) & (found.labels != found.predicted))
    order = wrong[np.argsort(-found.confidence[wrong], kind="stable")][:6]
    texts = column(cache, "train", "text")
    assert [(each.source_row, each.label, each.predicted, each.text) for each in found.disagreements] == [
        (i, found.labels[i], found.predicted[i], texts[i]) for i in order.tolist()
    ]
    assert [each.confidence for each in found.disagreements] == found.confidence[order].tolist()


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.kind)
def test_a_language_models_split(tmp_path, lm_tokenizer, encoding):
    cache = build_cache(tmp_path / "c", lm_tokenizer, encoding=encoding)
    found = measure(cache, "train")
    ids, flags = column(cache, "train", "input_ids"), column(cache, "train", "supervised")
    following = [ids[r][t + 1] for r in range(len(ids)) for t in range(len(ids[r])) if flags[r][t]]
    np.testing.assert_array_equal(found.labels, following)
    np.testing.assert_array_equal(found.predicted, first_ids(cache, "train"))
    np.testing.assert_allclose(found.nll, column(cache, "train", "teacher_nll_sum"))
    assert found.disagreements == ()
    assert found.by_position == isinstance(encoding, Full)
    if not found.by_position:
        counts = np.asarray([sum(row) for row in flags])
        np.testing.assert_allclose(found.entropy, np.asarray(column(cache, "train", "teacher_entropy_sum")) / counts)
    assert ((found.ranks == 1) == (found.labels == found.predicted)).all()


def test_chunks_change_nothing(tmp_path, bert_tokenizer, monkeypatch):
    cache = build_cache(tmp_path / "c", bert_tokenizer, encoding=TopK(4), classes=7, tokens=False)
    whole = measure(cache, "train")
    monkeypatch.setattr(measures, "_CHUNK_POSITIONS", 7)
    parts = measure(cache, "train")
    for name in ("labels", "predicted", "confidence", "entropy", "kept_mass", "kept_classes", "ranks", "lengths"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    assert whole.disagreements == parts.disagreements


def test_a_large_split_is_sampled_from_all_over_it(tmp_path, bert_tokenizer, monkeypatch):
    cache = build_cache(
        tmp_path / "c", bert_tokenizer, encoding=Full(), classes=3, tokens=False, per_shard=20, shards=10
    )
    monkeypatch.setattr(measures, "_GROUPS", 4)
    found = measure(cache, "train", most=24)
    assert (len(found.labels), found.rows, found.positions) == (24, 200, 200)
    labels = [NO_LABEL if each is None else each for each in column(cache, "train", "label")]
    rows = [start + i for start in (0, 60, 120, 180) for i in range(6)]  # the first 6 of 4 shards, the last among them
    assert found.labels.tolist() == [labels[row] for row in rows]
    # Fewer positions are read where the cache stores full distributions over many classes.
    monkeypatch.setattr(measures, "_CLASSES", 36)
    assert len(measure(cache, "train").labels) == 12


def test_small_row_groups_are_enough_of_them(tmp_path, bert_tokenizer, monkeypatch):
    cache = build_cache(
        tmp_path / "c", bert_tokenizer, encoding=Full(), classes=3, tokens=False, per_shard=5, shards=12
    )
    monkeypatch.setattr(measures, "_GROUPS", 2)
    assert len(measure(cache, "train", most=40).labels) == 40


def test_an_unknown_entropy_is_not_a_number(tmp_path, bert_tokenizer):
    rows = [
        softlabel.LabelledRow(
            bert_tokenizer("the cat")["input_ids"],
            soft_labels=softlabel.softlabels.top_soft_labels([[n % 3, (n + 1) % 3]], [[-0.3, -2.0]], 3, k=2),
        )
        for n in range(4)
    ]
    cache = softlabel.write_cache(
        rows,
        tmp_path / "c",
        task="sequence-classification",
        tokenizer=bert_tokenizer,
        encoding=TopK(2, (1.0,)),
        teacher="t",
        label_names=("a", "b", "c"),
    )
    found = measure(cache, "train")
    assert np.isnan(found.entropy).all()
    assert found.predicted.tolist() == [0, 1, 2, 0]
    assert (found.labels == NO_LABEL).all()


def test_no_such_split(tmp_path, lm_tokenizer):
    with pytest.raises(CacheError, match="no split 'dev'"):
        measure(build_cache(tmp_path / "c", lm_tokenizer), "dev")
