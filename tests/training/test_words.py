"""Token classification end to end.

Covers a teacher, its cache, students with two tokenizers, and refused inputs.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForTokenClassification

import pipeline as softlabel
from pipeline.cache import Cache, verify
from pipeline.cache.transforms.convert import convert
from pipeline.cache.transforms.filter import filter_rows
from pipeline.cache.transforms.merge import merge
from pipeline.capture.labelled import LabelledRow
from pipeline.capture.write import write_cache
from pipeline.config import DataConfig, TrainTeacherConfig
from pipeline.errors import BadRowError, ContractError, MisuseError, ModelError, SourceError, TrainingError
from pipeline.evaluation import evaluate
from pipeline.models import load_model
from pipeline.records import NO_LABEL, Columns, Full, Tokenization, TopK
from pipeline.tasks import get_task
from pipeline.training.batches.collate import Collator
from pipeline.training.teacher import run as train_teacher
from tests.support.entities import TAGS, entities, sentences
from tests.support.once import once
from tests.support.teaching import pretrained, train, write

TASK = "token-classification"
WORDS = Columns(text=None, words="tokens", label="ner_tags")


@pytest.fixture
def teacher(tmp_path, bert_tokenizer) -> Path:
    """Train a teacher on the sentences for 12 epochs."""

    def make(folder: Path) -> None:
        data = DataConfig(
            dataset=str(write(folder / "data", sentences())), words_column="tokens", label_column="ner_tags"
        )
        base = pretrained(folder / "base", bert_tokenizer)
        metrics = train_teacher(
            TrainTeacherConfig(
                task=TASK,
                data=data,
                model=str(base),
                output=str(folder / "teacher"),
                epochs=12,
                batch_size=8,
                learning_rate=4e-3,
            )
        )
        assert metrics["f1"] > 0.9

    once((__name__, "teacher"), make, tmp_path)
    return tmp_path / "teacher"


@pytest.fixture
def cache(tmp_path, teacher) -> Cache:
    def make(folder: Path) -> None:
        softlabel.cache_logits(
            str(teacher), sentences(), folder / "cache", task=TASK, columns=WORDS, rows_per_shard=60, batch_tokens=256
        )

    once((__name__, "cache"), make, tmp_path)
    return Cache.open(tmp_path / "cache")


def test_cached_values_are_the_models(cache, teacher):
    model = AutoModelForTokenClassification.from_pretrained(teacher).eval()
    names = cache.manifest.contract.label_names
    assert set(names) == set(TAGS)
    assert not verify(cache.root).problems
    source = sentences()["train"]
    for row in cache.dataset("train"):
        example = row.example
        assert list(example.words) == source[example.source_row]["tokens"]
        tags = source[example.source_row]["ner_tags"]
        expected = [NO_LABEL] * len(example.words) if tags is None else [names.index(tag) for tag in tags]
        assert example.labels.tolist() == expected
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(example.input_ids.astype(np.int64))[None]).logits[0]
        wanted = torch.log_softmax(logits[torch.from_numpy(example.supervised)], -1)
        torch.testing.assert_close(row.soft.top_logprobs.view(-1, len(names)), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.full
def test_a_student_comes_close_to_its_teacher_and_a_control_beside_it(tmp_path, cache, teacher, bert_tokenizer):
    start = pretrained(tmp_path / "start", bert_tokenizer, seed=1, num_hidden_layers=1)
    train(cache, start, tmp_path / "untrained", max_steps=1, learning_rate=1e-9)
    train(cache, start, tmp_path / "student")
    train(cache, start, tmp_path / "control", hard_weight=1.0, soft_weight=0.0)
    found = evaluate(cache, {name: tmp_path / name for name in ("untrained", "student", "control")})
    before, student, control = found.students
    assert found.main_metric == "f1"
    assert before.agreement < 0.75
    assert student.agreement > 0.95
    assert control.metrics["f1"] > 0.8
    assert student.kl < before.kl / 5
    assert student.retention == pytest.approx(student.metrics["f1"] / found.teacher.metrics["f1"])
    assert student.retention_interval.low <= student.retention <= student.retention_interval.high


def test_a_student_with_another_tokenizer_learns_through_the_words(tmp_path, cache, lm_tokenizer):
    start = pretrained(tmp_path / "start", lm_tokenizer, seed=1, num_hidden_layers=1)
    result = train(cache, start, tmp_path / "student")
    assert result.own_tokenizer is None
    found = evaluate(cache, {"student": tmp_path / "student"}).students[0]
    assert found.agreement > 0.9


def test_a_row_that_the_student_cannot_take_whole_is_told(tmp_path, cache, lm_tokenizer):
    lm_tokenizer.model_max_length, before = 6, lm_tokenizer.model_max_length
    try:
        start = pretrained(tmp_path / "start", lm_tokenizer)
    finally:
        lm_tokenizer.model_max_length = before
    with pytest.raises(
        ContractError, match=r"words are labelled, and . of them are within the 6 tokens that the student takes"
    ):
        train(cache, start, tmp_path / "student", max_steps=1)


def test_a_row_that_the_student_cannot_read_is_told(cache, lm_tokenizer):
    collator = Collator(get_task(TASK), lm_tokenizer, 1.0, retokenize=Tokenization(0))
    with pytest.raises(
        ContractError, match=r"source row 0: the student's tokenizer cannot read the row: no word is left"
    ):
        collator.collate_block(next(iter(cache.dataset("train").blocks())))


def test_without_the_words_another_tokenizer_is_refused(tmp_path, teacher, lm_tokenizer):
    bare = softlabel.cache_logits(
        str(teacher), sentences(), tmp_path / "bare", task=TASK, columns=WORDS, store_text=False
    )
    assert "position_words" not in bare.manifest.contract.columns
    assert bare.dataset("train")[0].example.words is None
    with pytest.raises(
        ContractError, match="the cache stores no texts to tokenize with it; cache again with --store-text"
    ):
        train(bare, pretrained(tmp_path / "start", lm_tokenizer), tmp_path / "student")


def written(folder: Path, tokenizer: Any, *rows: dict[str, Any]) -> Cache:
    """Write a cache with rows of four tokens, of which the second and the fourth start words."""
    logits = np.eye(2, 3, dtype=np.float32)
    made = [LabelledRow([2, 5, 6, 7], logits, supervised=[False, True, False, True], **row) for row in rows]
    return write_cache(made, folder, task=TASK, tokenizer=tokenizer, encoding=Full(), teacher="a", num_classes=3)


def test_rows_of_ones_own_are_written(tmp_path, bert_tokenizer, lm_tokenizer):
    cache = written(
        tmp_path / "a", bert_tokenizer, {"labels": [0, NO_LABEL], "words": ["a", "b"]}, {"words": ["c", "d"]}
    )
    first, second = (row.example for row in cache.dataset("train"))
    assert (first.words, first.labels.tolist()) == (("a", "b"), [0, NO_LABEL])
    assert (second.words, second.labels.tolist()) == (("c", "d"), [NO_LABEL, NO_LABEL])
    bare = written(tmp_path / "b", bert_tokenizer, {"text": "a b"})
    with pytest.raises(ContractError, match="the cache stores no texts to tokenize with it"):
        train(bare, pretrained(tmp_path / "start", lm_tokenizer), tmp_path / "student")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"labels": [0]}, "row 1: labels: expected 2, one a supervised position, found 1"),
        ({"labels": [0, 3]}, r"row 1: expected labels of 0 to 2, found \[0, 3\]"),
        ({"labels": [2**32, 0]}, "row 1: labels: expected class ids, found"),
        ({"labels": [0.5, 0]}, "row 1: labels: expected class ids, found"),
        ({"labels": ["O", "O"]}, "row 1: labels: expected class ids, found"),
        ({"words": ["a"]}, "row 1: words: expected 2, one a supervised position, found 1"),
        ({"words": ["a", None]}, r"row 1: words\[1\] is null"),
        ({"words": "ab"}, "row 1: words: expected a list, found str"),
        ({"words": None}, "row 1: expected words, as the first row has, found none"),
    ],
)
def test_rows_of_ones_own_that_do_not_fit(tmp_path, bert_tokenizer, row, message):
    with pytest.raises(BadRowError, match=message):
        written(tmp_path / "a", bert_tokenizer, {"words": ["a", "b"]}, {"words": ["a", "b"], **row})


def test_words_are_of_this_task_alone(tmp_path, bert_tokenizer):
    row = LabelledRow([2, 5], np.zeros((1, 2), np.float32), words=["a"])
    with pytest.raises(MisuseError, match="words and labels of words are of token classification"):
        write_cache(
            [row], tmp_path / "a", task="sequence-classification", tokenizer=bert_tokenizer, encoding=Full(), teacher="a", num_classes=2
        )  # fmt: skip


def test_columns_that_a_source_calls_words_and_labels_are_kept(tmp_path, bert_tokenizer):
    kept = [{"words": "1", "labels": "x"}, {"words": "2", "labels": None}]
    rows = [LabelledRow([2, 5 + i], np.eye(1, 2, dtype=np.float32), text="a", kept=each) for i, each in enumerate(kept)]
    cache = write_cache(
        rows, tmp_path / "a", task="sequence-classification", tokenizer=bert_tokenizer, encoding=Full(), teacher="a", num_classes=2
    )  # fmt: skip
    assert not verify(cache.root).problems
    assert [row.example.kept for row in Cache.open(cache.root).dataset("train")] == kept
    few = filter_rows(cache, tmp_path / "b", where="words = '2'")
    assert [row.example.kept for row in few.dataset("train")] == kept[1:]


def test_labels_alone_leave_out_the_rows_without(tmp_path, cache, bert_tokenizer, caplog):
    caplog.set_level(logging.INFO)
    start = pretrained(tmp_path / "start", bert_tokenizer)
    result = train(cache, start, tmp_path / "student", max_steps=2, hard_weight=1.0, soft_weight=0.0)
    assert result.rows == 140
    unlabelled = softlabel.cache_logits(
        str(tmp_path / "teacher"),
        sentences()["test"].remove_columns("ner_tags"),
        tmp_path / "bare",
        task=TASK,
        columns=WORDS,
    )
    with pytest.raises(TrainingError, match="trains on hard labels, and no row has one"):
        train(unlabelled, start, tmp_path / "other", hard_weight=1.0, soft_weight=0.0)


def test_caches_are_merged_filtered_and_converted(tmp_path, cache):
    joined = merge([cache, cache], tmp_path / "joined")
    words = [row.example.words for row in cache.dataset("test")]
    assert [row.example.words for row in joined.dataset("test")] == list(dict.fromkeys(words))
    few = filter_rows(cache, tmp_path / "few", where="len(position_words) > 5")
    assert all(len(row.example.words) > 5 for row in few.dataset("train"))
    smaller = convert(cache, tmp_path / "smaller", encoding=TopK(3))
    assert not verify(smaller.root).problems
    ours, theirs = smaller.dataset("train")[3].example, cache.dataset("train")[3].example
    assert (ours.words, ours.labels.tolist()) == (theirs.words, theirs.labels.tolist())


def test_texts_with_spans_make_the_same_cache_as_words(tmp_path, teacher, cache):
    def as_spans(row: dict[str, Any]) -> dict[str, Any]:
        places, end = [], 0
        for word in row["tokens"]:
            places.append((end, end + len(word)))
            end += len(word) + 1
        spans: list[dict[str, Any]] = []
        for (first, last), tag in zip(places, row["ner_tags"] or (), strict=False):
            if tag.startswith("B-"):
                spans.append({"start": first, "end": last, "label": tag[2:]})
            elif tag.startswith("I-"):
                spans[-1]["end"] = last
        return {"text": " ".join(row["tokens"]), "entities": None if row["ner_tags"] is None else spans}

    rows = DatasetDict(
        {split: Dataset.from_list([as_spans(row) for row in part]) for split, part in sentences().items()}
    )
    found = softlabel.cache_logits(str(teacher), rows, tmp_path / "spans", task=TASK, columns=Columns(label="entities"))
    for split in ("train", "test"):
        pairs = zip(found.dataset(split), cache.dataset(split), strict=True)
        assert all(a.content_hash == b.content_hash and a.example.words == b.example.words for a, b in pairs)


@pytest.mark.parametrize("kind", [int, float])
def test_numbers_in_another_order_than_the_teachers_are_refused(tmp_path, teacher, kind):
    """Labels are numbers without names, or floats as other tools write them for columns with nulls.

    O is the first class of the data and the last of the teacher's head.
    """
    rows = entities(2, 300)
    rows["ner_tags"] = [[kind(TAGS.index(tag)) for tag in tags] for tags in rows["ner_tags"]]
    with pytest.raises(
        SourceError, match=r"are in another order than the teacher's: of .* words it predicts the label of"
    ):
        softlabel.cache_logits(str(teacher), Dataset.from_dict(rows), tmp_path / "bad", task=TASK, columns=WORDS)
    assert not (tmp_path / "bad" / "manifest.json").exists()


def test_bad_rows_stop_or_are_set_aside(tmp_path, teacher):
    rows = Dataset.from_dict({"tokens": [["the", "cat"], ["old"]], "ner_tags": [["O"], ["O"]]})
    with pytest.raises(
        BadRowError, match="split train, row 0: ner_tags: expected 2 labels, one a word, found 1; correct the row"
    ):
        softlabel.cache_logits(str(teacher), rows, tmp_path / "a", task=TASK, columns=WORDS)
    found = softlabel.cache_logits(str(teacher), rows, tmp_path / "b", task=TASK, columns=WORDS, on_bad_row="skip")
    assert (found.manifest.bad_rows, len(found.dataset("train"))) == (1, 1)


def test_models_with_another_head_are_refused(tmp_path, teacher, bert_tokenizer):
    base = pretrained(tmp_path / "other", bert_tokenizer)
    with pytest.raises(ModelError, match="the checkpoint lacks 2 weights that BertForTokenClassification needs"):
        softlabel.cache_logits(str(base), sentences(), tmp_path / "a", task=TASK, columns=WORDS)
    assert load_model(get_task(TASK), str(teacher)).model.config.num_labels == len(TAGS)


@pytest.mark.full
def test_an_adapter_has_its_new_head(tmp_path, cache, bert_tokenizer):
    pytest.importorskip("peft")
    start = pretrained(tmp_path / "start", bert_tokenizer)
    train(
        cache, start, tmp_path / "student", lora_r=4, lora_target=("query", "value"), max_steps=200, learning_rate=1e-2
    )
    found = evaluate(cache, {"student": tmp_path / "student"}).students[0]
    assert found.agreement > 0.85  # predicting the largest class gives 0.7
