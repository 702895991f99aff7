"""Multiple choice end to end.

Covers a teacher, its cache, students, evaluation, and refused inputs.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoConfig, AutoModelForMultipleChoice, AutoTokenizer, set_seed

import pipeline as softlabel
from pipeline.cache import Cache, verify
from pipeline.cache.transforms.convert import convert
from pipeline.cache.views.page import write_page
from pipeline.capture.labelled import LabelledRow
from pipeline.capture.write import write_cache
from pipeline.config import DataConfig, PredictConfig, TrainTeacherConfig
from pipeline.errors import BadRowError, IntegrityError, MisuseError
from pipeline.evaluation import evaluate
from pipeline.models.predict import run as predict
from pipeline.records import Columns, Example, Full, Loss, Sampled, Tokenization, TopK
from pipeline.tasks.answers.candidates import ABSENT
from pipeline.training.teacher import run as train_teacher
from tests.conftest import TOPICS, WORDS
from tests.support.once import once
from tests.support.teaching import pretrained, train, write

TASK = "multiple-choice"
COLUMNS = Columns(text="question", choices=("choices",))
SMALL = {"num_hidden_layers": 1, "initializer_range": 0.1}


def rows(seed: int, count: int) -> dict[str, list[Any]]:
    """Return rows of two or three texts, each on another topic; the one on films is correct."""
    rng = random.Random(seed)
    found: dict[str, list[Any]] = {"question": [], "choices": [], "answer": []}
    for _ in range(count):
        names = ["film", *rng.sample(["business", "sport"], rng.randint(1, 2))]
        choices = [f"{TOPICS[name][0]} {rng.choice(WORDS[:6])}" for name in names]
        found["question"].append(" ".join(rng.sample(WORDS[:6], 2)))
        order = list(range(len(choices)))
        rng.shuffle(order)
        found["choices"].append([choices[i] for i in order])
        found["answer"].append(order.index(0))
    return found


def texts() -> DatasetDict:
    learnt, test = rows(0, 200), rows(1, 60)
    learnt["answer"] = [None if i % 5 else answer for i, answer in enumerate(learnt["answer"])]
    return DatasetDict({"train": Dataset.from_dict(learnt), "test": Dataset.from_dict(test)})


ASKED = Columns(text="question", choices=("choices",), label="answer")


@pytest.fixture
def teacher(tmp_path, bert_tokenizer) -> Path:
    def make(folder: Path) -> None:
        data = DatasetDict({"train": Dataset.from_dict(rows(0, 240)), "validation": Dataset.from_dict(rows(2, 60))})
        metrics = train_teacher(
            TrainTeacherConfig(
                task=TASK,
                data=DataConfig(
                    dataset=str(write(folder / "data", data)), text_column="question", choices_column=("choices",), label_column="answer"
                ),
                model=str(pretrained(folder / "base", bert_tokenizer, **SMALL)), output=str(folder / "teacher"), epochs=12, batch_size=8,
                learning_rate=3e-3,
            )
        )  # fmt: skip
        assert metrics["accuracy"] > 0.8

    once((__name__, "teacher"), make, tmp_path)
    return tmp_path / "teacher"


@pytest.fixture
def cache(tmp_path, teacher) -> Cache:
    def make(folder: Path) -> None:
        settings: dict[str, Any] = {"rows_per_shard": 70, "batch_tokens": 256}
        softlabel.cache_logits(str(teacher), texts(), folder / "cache", task=TASK, columns=ASKED, **settings)

    once((__name__, "cache"), make, tmp_path)
    return Cache.open(tmp_path / "cache")


def test_cached_values_are_the_models(cache, teacher):
    model = AutoModelForMultipleChoice.from_pretrained(teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    contract, source = cache.manifest.contract, texts()["train"]
    assert not verify(cache.root).problems
    assert (contract.num_classes, contract.tokenization.num_choices) == (3, 3)
    assert contract.label_names == ("choice 1", "choice 2", "choice 3")
    fewer = 0
    for row in cache.dataset("train"):
        given = source[row.example.source_row]
        assert row.example.label == given["answer"]
        assert list(row.example.choices) == given["choices"]
        count = len(given["choices"])
        inputs = tokenizer([given["question"]] * count, given["choices"], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**{name: tensor[None] for name, tensor in inputs.items()}).logits[0]
        found = row.soft.top_logprobs
        torch.testing.assert_close(found[:count], torch.log_softmax(logits, -1), atol=1e-4, rtol=1e-4)
        assert (found[count:].exp() == 0).all()
        fewer += count < 3
    assert fewer > 20
    assert load_dataset(str(cache.root), split="test")[0]["choice_texts"] == texts()["test"][0]["choices"]


@pytest.mark.parametrize("encoding", [Full(), TopK(2), Sampled(2.0)], ids=lambda e: e.kind)
def test_loss_and_gradient_of_rows_with_fewer_choices(cache, tmp_path, encoding):
    """Compares with plain PyTorch in float64 over the choices of each row.

    Missing choices contribute nothing.
    """
    from pipeline.softlabels import target
    from pipeline.tasks import get_task
    from pipeline.training.batches.collate import Collator, Picked
    from pipeline.training.losses import distillation_loss

    found = cache if isinstance(encoding, Full) else convert(cache, tmp_path / "other", encoding=encoding)
    temperature = 1.0
    picked = Picked((found.dataset("train").segments(np.arange(16)),), np.ones(16, dtype=bool))
    batch = Collator(get_task(TASK), found.tokenizer, temperature).collate(picked)
    has = batch.supervised
    assert not has.all()
    z = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    terms = distillation_loss(
        z.masked_fill(~has, ABSENT),
        batch.target,
        labels=batch.labels,
        loss=Loss(0.0, 1.0, temperature=temperature),
        temperature=temperature,
    )
    (ours,) = torch.autograd.grad(terms.total, z)
    dense = torch.zeros(16, 3, dtype=torch.float64)
    for n, row in enumerate(list(found.dataset("train"))[:16]):
        goal = target(row.soft, temperature)
        dense[n].index_add_(0, goal.ids, goal.weights.double())
    assert (dense[~has] < 1e-12).all()
    assert torch.isfinite(ours).all()
    assert (ours[~has] == 0).all()
    if isinstance(encoding, Full):
        log_p = torch.log_softmax(z.masked_fill(~has, -torch.inf), -1)
        plain = torch.where(dense > 0, dense * (dense.clamp_min(1e-300).log() - log_p), 0.0).sum(-1).mean()
        (expected,) = torch.autograd.grad(plain, z)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(terms.total, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.full
def test_students_learn_from_soft_labels_and_from_labels(cache, tmp_path, bert_tokenizer, monkeypatch):
    start = pretrained(tmp_path / "base", bert_tokenizer, seed=3, **SMALL)
    settings = {"max_steps": 250, "learning_rate": 3e-3, "batch_size": 16}
    train(cache, start, tmp_path / "student", hard_weight=0.1, soft_weight=0.9, **settings)
    train(cache, start, tmp_path / "control", hard_weight=1.0, soft_weight=0.0, **settings)
    train(cache, start, tmp_path / "start", max_steps=1, learning_rate=1e-9)
    names = ("start", "student", "control")
    report = evaluate(cache, {name: tmp_path / name for name in names}, split="test")
    first, student, control = report.students
    assert student.agreement > 0.8
    assert control.agreement > 0.8  # the soft labels of a teacher this confident add little to the data's labels
    assert student.kl < first.kl / 10
    (found,) = predict(
        PredictConfig(
            model=str(tmp_path / "student"), text=(TOPICS["film"][0],), choice=(TOPICS["sport"][0], TOPICS["film"][0])
        )
    )
    assert next(iter(found.labels)) == TOPICS["film"][0]
    assert sum(found.labels.values()) == pytest.approx(1.0)
    card = (tmp_path / "student" / "README.md").read_text()
    code = re.search(r"```python\n(import torch.*?)```", card, re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # the card's code runs


@pytest.mark.full
def test_a_student_with_another_tokenizer_learns_from_the_texts(cache, tmp_path, lm_tokenizer):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for topic in TOPICS.values() for word in topic} | set(WORDS))
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[SEP]", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=[("[SEP]", 2)]
    )
    other = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]", model_max_length=64
    )
    start = pretrained(tmp_path / "other", other, **SMALL)
    train(cache, start, tmp_path / "student", hard_weight=0.1, soft_weight=0.9, max_steps=250, learning_rate=3e-3)
    report = evaluate(cache, {"student": tmp_path / "student"}, split="test")
    assert report.students[0].agreement > 0.75


def test_pages_show_the_choices(cache, tmp_path):
    write_page(cache, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    first = texts()["train"][0]
    assert f"1. {first['choices'][0]}" in page
    assert "choice 2" in page


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "albert"])
def test_architectures(tmp_path, bert_tokenizer, kind):
    set_seed(0)
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "embedding_size": 16,
    }
    small |= {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 66}
    config = AutoConfig.for_model(kind, vocab_size=len(bert_tokenizer), pad_token_id=0, **small)
    model = AutoModelForMultipleChoice.from_config(config)
    found = softlabel.cache_logits(
        model, texts()["test"], tmp_path / "cache", task=TASK, columns=ASKED, tokenizer=bert_tokenizer, max_length=32
    )
    assert not verify(found.root).problems


def labelled(value: Any, choices: Any) -> Any:
    data = Dataset.from_list([{"question": "what", "choices": choices, "answer": value}])
    from pipeline.sources import from_datasets, read_examples

    (found,) = read_examples(from_datasets(data, ASKED), "train", 0, 1, None)
    return found


ARC = {"text": ["the sun", "the moon"], "label": ["1", "2"]}


@pytest.mark.parametrize(
    ("value", "choices", "expected"),
    [
        (1, ["a cat", "a dog"], 1), ("1", ["a cat", "a dog"], 1), ("B", ["a cat", "a dog"], 1), ("b", ["a cat", "a dog"], 1),
        ("a dog", ["a cat", "a dog"], 1), ("2", ARC, 1), ("1", ARC, 0), (None, ARC, None), (-1, ["a cat", "a dog"], None),
        ("", ["a cat", "a dog"], None), ("A", [{"text": "x", "label": "B"}, {"text": "y", "label": "A"}], 1),
        ("7", ["5", "7"], 1),
        (1, {"text": ["x", "y"], "label": [1, 2]}, 0),
        (2.0, {"text": ["x", "y"], "label": ["1", "2"]}, 1),
        (1, {"text": ["x", "y"], "label": ["A", "B"]}, 1), (1.0, ["a cat", "a dog"], 1),
    ],
)  # fmt: skip
def test_labels_of_every_kind(value, choices, expected):
    assert labelled(value, choices).label == expected


@pytest.mark.parametrize(
    ("value", "choices", "match"),
    [
        (2, ["a", "b"], r"answer: expected 0 to 1, A to B, or the text of a choice, found 2"),
        ("C", ["a", "b"], "found 'C'"), ("a", ["a", "a"], "'a' names 2 of the choices"), (0, ["a"], "choices: expected 2 to 64 choices, found 1"),
        (0, ["a", None], r"choices\[1\] is null"), (0, ["a", ""], r"choices\[1\] is empty"), (0, None, "choices is null"),
        (0.5, ["a", "b"], "found 0.5"),
        (float("inf"), ["a", "b"], "found inf"),
        ("²", ["a", "b"], "found '²'"),
        (3, {"text": ["x", "y"], "label": [1, 2]}, "expected one of 1, 2"),
    ],
)  # fmt: skip
def test_rows_that_are_set_aside(value, choices, match):
    if choices is None:
        data = Dataset.from_list(
            [{"question": "q", "choices": ["a", "b"], "answer": 0}, {"question": "q", "choices": None, "answer": 0}]
        )
        from pipeline.sources import from_datasets, read_examples

        reason = list(read_examples(from_datasets(data, ASKED), "train", 0, 2, None))[1].reason
    else:
        reason = labelled(value, choices).reason
    assert re.search(match, reason), reason


def test_a_column_for_each_choice(tmp_path, teacher):
    """Columns as in SWAG; `--text-pair-column` holds the beginning of each choice."""
    data = Dataset.from_list(
        [{"sent1": "the cat", "sent2": "sat", "ending0": "on a mat", "ending1": "in a tree", "label": 1}] * 3
    )
    columns = Columns(text="sent1", text_pair="sent2", choices=("ending0", "ending1"))
    found = softlabel.cache_logits(str(teacher), data, tmp_path / "cache", task=TASK, columns=columns, max_length=24)
    row = next(iter(found.dataset("train")))
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    expected = tokenizer(["the cat"] * 2, ["sat on a mat", "sat in a tree"])["input_ids"]
    assert row.example.input_ids.tolist() == [i for ids in expected for i in ids]
    assert row.example.document_lengths.tolist() == [len(ids) for ids in expected]
    assert row.example.label == 1


def test_texts_that_are_too_long_are_counted(tmp_path, teacher):
    data = Dataset.from_list([{"question": "the cat " * 40, "choices": ["a mat", "a tree"], "answer": 0}] * 4)
    found = softlabel.cache_logits(str(teacher), data, tmp_path / "cache", task=TASK, columns=ASKED, max_length=16)
    row = next(iter(found.dataset("train")))
    assert row.example.document_lengths.tolist() == [16, 16]
    contents = json.loads((found.root / "reports" / "contents.json").read_text())
    assert contents["cut_rows"] == 4


def test_rows_labelled_elsewhere(tmp_path, bert_tokenizer):
    given = [
        LabelledRow([2, 5, 3, 2, 6, 7, 3], logits=torch.randn(1, 2 + i % 2), label=1, choice_lengths=[3, 4])
        for i in range(4)
    ]
    settings: dict[str, Any] = {"task": TASK, "tokenizer": bert_tokenizer, "encoding": Full(), "teacher": "elsewhere"}
    found = write_cache(given, tmp_path / "cache", num_classes=3, **settings)
    assert not verify(found.root).problems
    row = next(iter(found.dataset("train")))
    assert row.example.document_lengths.tolist() == [3, 4, 0]
    assert float(row.soft.top_logprobs.exp()[2]) == 0.0
    bad = [LabelledRow([2, 5, 3], logits=torch.randn(1, 3), choice_lengths=[3, 4])]
    with pytest.raises(BadRowError, match="choice_lengths: expected 2 to 3 lengths of at least 2 that sum to 3"):
        write_cache(bad, tmp_path / "bad", num_classes=3, **settings)


def test_damaged_lengths_are_found(cache):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.cache.format.contents import check_contents

    table = pq.read_table(cache.root / "data" / "train-00000.parquet")
    lengths = table.column("document_lengths").to_pylist()
    total = sum(lengths[0])
    for bad, what in (
        ([total, 0, 0], "two choices"),
        ([total - 4, 0, 4], "missing choices at the end"),
        ([total - 2, 2], "expected 3 in every row"),
    ):
        column = pa.array([bad, *lengths[1:]], pa.list_(pa.int32()))
        changed = table.set_column(table.schema.get_field_index("document_lengths"), "document_lengths", column)
        with pytest.raises(IntegrityError, match=what):
            check_contents(changed, cache.manifest.contract, "here")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"columns": Columns(text="question")}, "reads --text-column and --choices-column"),
        (
            {"task": "sequence-classification"},
            "--choices-column: --task sequence-classification does not choose between texts",
        ),
        ({"label_map": {"a": "b"}}, "--label-map goes with class labels"),
    ],
)
def test_what_is_refused(tmp_path, teacher, settings, match):
    with pytest.raises(MisuseError, match=re.escape(match)):
        softlabel.cache_logits(
            str(teacher), texts(), tmp_path / "cache", **{"task": TASK, "columns": ASKED, **settings}
        )


def test_the_teachers_loss_is_over_the_choices_that_a_row_has(bert_tokenizer):
    """Compares value and gradient with plain PyTorch in float64, also in accumulated batches."""
    from types import SimpleNamespace

    from pipeline.tasks import get_task
    from pipeline.training.batches.labelled import LabelledCollator, choice_loss

    task = get_task(TASK)
    examples = [
        Example(0, "the cat", choices=("sat", "on", "a")),
        Example(1, "the cat", choices=("sat", "on"), label=1),
    ]
    examples[0] = dataclasses.replace(examples[0], label=2)
    tokens = list(task.tokenize(examples, "train", bert_tokenizer, Tokenization(32)))
    batch = LabelledCollator(task, 0, None)(tokens)
    assert batch["input_ids"].shape[:2] == (2, 3)
    z = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = choice_loss(SimpleNamespace(logits=z), batch["labels"])
    plain = (-torch.log_softmax(z[0], -1)[2] - torch.log_softmax(z[1, :2], -1)[1]) / 2
    torch.testing.assert_close(loss, plain)
    ours, expected = (torch.autograd.grad(each, z, retain_graph=True)[0] for each in (loss, plain))
    torch.testing.assert_close(ours, expected)
    assert float(ours[1, 2]) == 0.0
    torch.testing.assert_close(choice_loss(SimpleNamespace(logits=z), batch["labels"], 8), plain * 2 / 8)


def test_a_batch_is_as_wide_as_its_rows_need(cache):
    """The cache has three choices; batches of rows with two are narrower, and logits are padded."""
    from pipeline.tasks import get_task

    task = get_task(TASK)
    few = [row.example for row in cache.dataset("train") if (row.example.document_lengths > 0).sum() == 2][:4]
    inputs, has = task.collate(few, 0)
    assert inputs["input_ids"].shape[:2] == (4, 2)
    assert has.shape == (4, 3)


def test_a_longest_row_without_room_for_a_choice_is_refused(tmp_path, teacher):
    with pytest.raises(MisuseError, match="--max-length 4: expected at least 5"):
        softlabel.cache_logits(str(teacher), texts(), tmp_path / "cache", task=TASK, columns=ASKED, max_length=4)


@pytest.mark.parametrize("choice", [("a", "a"), ("a", " "), ("a",)])
def test_choices_to_predict_from(choice):
    with pytest.raises(MisuseError, match="--choice"):
        PredictConfig(model="m", text=("q",), choice=choice)
