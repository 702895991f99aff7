"""Question answering end to end.

Covers windows, a teacher, its cache, students, evaluation, and refused inputs.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer, set_seed

import pipeline as softlabel
from pipeline.cache import Cache, verify
from pipeline.cache.views.inspection import describe
from pipeline.cache.views.page import write_page
from pipeline.config import DataConfig, PredictConfig, ReportConfig, TrainTeacherConfig
from pipeline.errors import ContractError, MisuseError
from pipeline.evaluation import evaluate
from pipeline.evaluation.report.report import report
from pipeline.metrics.spans import overlap_of_spans
from pipeline.models.predict import run as predict
from pipeline.records import NO_LABEL, BadRow, Columns, Full, Loss, Sampled, Tokenization, TopK
from pipeline.sources import from_datasets, label_reader, read_examples
from pipeline.tasks import get_task
from pipeline.tasks.answers.candidates import ABSENT
from pipeline.training.teacher import run as train_teacher
from tests.conftest import TOPICS, WORDS
from tests.support.once import once
from tests.support.teaching import pretrained, train, write

TASK = "question-answering"
COLUMNS = Columns(text="question", text_pair="context", label="answers")
SMALL = {"num_hidden_layers": 1, "initializer_range": 0.1}


def rows(seed: int, count: int) -> dict[str, list[Any]]:
    """Return rows whose answer is the text's word on films; one text in six has none."""
    rng = random.Random(seed)
    found: dict[str, list[Any]] = {"question": [], "context": [], "answers": []}
    for i in range(count):
        words = [rng.choice(WORDS[:6]) for _ in range(rng.randint(4, 12))]
        place = rng.randrange(len(words))
        there = i % 6 != 5
        if there:
            words[place] = TOPICS["film"][0]
        start = len(" ".join(words[:place])) + (place > 0)
        found["question"].append(f"{rng.choice(WORDS[:6])} {WORDS[0]}")
        found["context"].append(" ".join(words))
        found["answers"].append({"text": [words[place]] if there else [], "answer_start": [start] if there else []})
    return found


def texts() -> DatasetDict:
    learnt, test = rows(0, 200), rows(1, 60)
    learnt["answers"] = [None if i % 5 else answer for i, answer in enumerate(learnt["answers"])]
    return DatasetDict({"train": Dataset.from_dict(learnt), "test": Dataset.from_dict(test)})


@pytest.fixture
def teacher(tmp_path, bert_tokenizer) -> Path:
    def make(folder: Path) -> None:
        data = DatasetDict({"train": Dataset.from_dict(rows(0, 240)), "validation": Dataset.from_dict(rows(2, 60))})
        metrics = train_teacher(
            TrainTeacherConfig(
                task=TASK,
                data=DataConfig(
                    dataset=str(write(folder / "data", data)), text_column="question", text_pair_column="context", label_column="answers",
                    max_length=48,
                ),
                model=str(pretrained(folder / "base", bert_tokenizer, **SMALL)), output=str(folder / "teacher"), epochs=12, batch_size=8,
                learning_rate=3e-3,
            )
        )  # fmt: skip
        assert metrics["f1"] > 0.8
        assert metrics["exact"] > 0.8

    once((__name__, "teacher"), make, tmp_path)
    return tmp_path / "teacher"


def capture(teacher: Path, output: Path, **settings: Any) -> Cache:
    given = {"task": TASK, "columns": COLUMNS, "rows_per_shard": 70, "batch_tokens": 512, **settings}
    return softlabel.cache_logits(str(teacher), texts(), output, **given)


@pytest.fixture
def cache(tmp_path, teacher) -> Cache:
    once((__name__, "cache"), lambda folder: capture(teacher, folder / "cache"), tmp_path)
    return Cache.open(tmp_path / "cache")


def logits_of(teacher: Path, question: str, context: str) -> torch.Tensor:
    """Return the logits that plain `transformers` computes, (2, T)."""
    model = AutoModelForQuestionAnswering.from_pretrained(teacher).eval()
    with torch.no_grad():
        found = model(**AutoTokenizer.from_pretrained(teacher)(question, context, return_tensors="pt"))
    return torch.stack([found.start_logits[0], found.end_logits[0]])


@pytest.mark.parametrize("encoding", [Full(), TopK(4)], ids=lambda e: e.kind)
def test_cached_values_are_the_models(teacher, tmp_path, encoding):
    cache = capture(teacher, tmp_path / "cache", encoding=encoding)
    assert not verify(cache.root).problems
    contract, source = cache.manifest.contract, texts()["train"]
    assert (contract.num_classes, contract.label_names) == (48, ("start", "end"))
    for row in list(cache.dataset("train"))[::5]:
        given = source[row.example.source_row]
        expected = torch.log_softmax(logits_of(teacher, given["question"], given["context"]), -1)
        offsets = row.soft.top_offsets
        for n in range(2):
            part = slice(int(offsets[n]), int(offsets[n + 1]))
            ids, found = row.soft.top_ids[part], row.soft.top_logprobs[part]
            inside = ids < expected.shape[1]
            torch.testing.assert_close(found[inside], expected[n][ids[inside]], atol=5e-3, rtol=1e-3)
            assert (found[~inside].exp() == 0).all()


def test_labels_are_places_of_tokens(cache, teacher):
    tokenizer, source = AutoTokenizer.from_pretrained(teacher), texts()
    for split in ("train", "test"):
        for row in cache.dataset(split):
            answers, (first, last) = source[split][row.example.source_row]["answers"], row.example.labels.tolist()
            if answers is None:
                assert (first, last) == (NO_LABEL, NO_LABEL)
            elif not answers["text"]:
                assert (first, last) == (0, 0)
                assert row.example.input_ids[0] == tokenizer.cls_token_id
            else:
                assert tokenizer.decode(row.example.input_ids[first : last + 1]) == answers["text"][0]


def windows(tokenizer: Any, question: str, context: str, answer: str | None, **settings: Any) -> list[Any]:
    found = {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    data = Dataset.from_list([{"question": question, "context": context, "answers": found}])
    task, source = get_task(TASK), from_datasets(data, COLUMNS)
    labels = label_reader(source, (), holds="answers")
    return list(
        task.tokenize(read_examples(source, "train", 0, 1, labels), "train", tokenizer, Tokenization(**settings))
    )


def test_windows_of_a_long_text_cover_it_and_say_where_the_answer_is(bert_tokenizer):
    words = [WORDS[i % 6] for i in range(60)]
    words[40] = TOPICS["film"][0]
    found = windows(bert_tokenizer, WORDS[1], " ".join(words), words[40], max_length=24, stride=6)
    assert [row.piece for row in found] == list(range(len(found)))
    assert all(len(row.input_ids) <= 24 for row in found)
    whole = bert_tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    head = bert_tokenizer(WORDS[1], WORDS[2]).sequence_ids().index(1)
    parts = [row.input_ids[head:-1].tolist() for row in found]
    joined = parts[0] + [i for part in parts[1:] for i in part[6:]]
    assert joined == whole
    with_answer = [row for row in found if row.labels.tolist() != [0, 0]]
    assert 1 <= len(with_answer) < len(found)
    for row in with_answer:
        first, last = row.labels
        assert bert_tokenizer.decode(row.input_ids[first : last + 1]) == words[40]


def test_an_answer_that_a_window_cuts_is_not_in_it(bert_tokenizer):
    context = " ".join([WORDS[0]] * 10 + [TOPICS["film"][0], TOPICS["sport"][0]] + [WORDS[1]] * 10)
    answer = f"{TOPICS['film'][0]} {TOPICS['sport'][0]}"
    for stride in range(6):
        for row in windows(bert_tokenizer, WORDS[2], context, answer, max_length=17, stride=stride):
            first, last = row.labels.tolist()
            text = bert_tokenizer.decode(row.input_ids)
            assert ((first, last) == (0, 0)) == (answer not in text)
            if first:
                assert bert_tokenizer.decode(row.input_ids[first : last + 1]) == answer


def test_a_question_without_room_for_the_text_is_a_bad_row(bert_tokenizer):
    (bad,) = windows(bert_tokenizer, " ".join([WORDS[0]] * 30), "a text", None, max_length=24)
    assert isinstance(bad, BadRow)
    assert "leaves room for the text within 24 tokens" in bad.reason


@pytest.mark.parametrize(
    ("answers", "match"),
    [
        ({"text": ["cat"], "answer_start": [5]}, "expected 'cat' at character 5"),
        ({"text": ["cat", "sat"], "answer_start": [4]}, "as many texts as numbers"),
        ({"text": [" "], "answer_start": [3]}, "expected a text and the number"),
        ({"text": ["cat"], "answer_start": [-4]}, "at character -4"),
    ],
)
def test_answers_that_do_not_stand_there(answers, match):
    data = Dataset.from_list([{"question": "who", "context": "the cat sat", "answers": answers}])
    source = from_datasets(data, COLUMNS)
    (bad,) = read_examples(source, "train", 0, 1, label_reader(source, (), holds="answers"))
    assert re.search(match, bad.reason), bad.reason


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["cat"], "answer_start": [4]},
        {"text": "cat", "answer_start": 4},
        [{"text": "cat", "answer_start": 4}],
        {"text": ["cat"], "answer_start": [4.0]},
        {"text": [" cat "], "answer_start": [3]},
    ],
    ids=["squad", "one", "list", "floats", "space"],
)
def test_every_form_of_answers(answers):
    data = Dataset.from_list([{"question": "who", "context": "the cat sat", "answers": answers}])
    source = from_datasets(data, COLUMNS)
    (row,) = read_examples(source, "train", 0, 1, label_reader(source, (), holds="answers"))
    assert row.answers == ((4, 7),)


@pytest.mark.parametrize("encoding", [Full(), TopK(3), Sampled(4.0)], ids=lambda e: e.kind)
def test_loss_and_gradient(teacher, tmp_path, encoding):
    """Compares with plain PyTorch in float64 over the candidate positions of each row."""
    from pipeline.softlabels import target
    from pipeline.training.batches.collate import Collator, Picked
    from pipeline.training.losses import distillation_loss

    found = capture(teacher, tmp_path / "cache", encoding=encoding)
    picked = Picked((found.dataset("train").segments(np.arange(8)),), np.ones(8, dtype=bool))
    batch = Collator(get_task(TASK), found.tokenizer, 1.0).collate(picked)
    has = batch.supervised.repeat_interleave(2, 0)  # (16, V)
    assert has.shape == (16, 48)
    z = torch.randn(16, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    terms = distillation_loss(
        z.masked_fill(~has, ABSENT),
        batch.target,
        labels=batch.labels,
        loss=Loss(0.0, 1.0, temperature=1.0),
        temperature=1.0,
    )
    (ours,) = torch.autograd.grad(terms.total, z)
    assert torch.isfinite(ours).all()
    assert (ours[~has] == 0).all()
    if isinstance(encoding, Full):
        log_q = (
            torch.stack([row.soft.top_logprobs.view(2, 48) for row in list(found.dataset("train"))[:8]])
            .flatten(0, 1)
            .double()
        )
        log_p = torch.log_softmax(z.masked_fill(~has, -torch.inf), -1)
        plain = torch.where(has, log_q.exp() * (log_q - log_p), 0.0).sum(-1).mean()
        (expected,) = torch.autograd.grad(plain, z)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    goal = target(next(iter(found.dataset("train"))).soft, 1.0)
    assert int(goal.ids.max()) < 48


@pytest.mark.full
def test_students_learn_from_soft_labels_and_from_labels(cache, tmp_path, bert_tokenizer, monkeypatch):
    start = pretrained(tmp_path / "base", bert_tokenizer, seed=3, **SMALL)
    settings = {"max_steps": 250, "learning_rate": 3e-3, "batch_size": 16}
    train(cache, start, tmp_path / "student", hard_weight=0.1, soft_weight=0.9, **settings)
    train(cache, start, tmp_path / "control", hard_weight=1.0, soft_weight=0.0, **settings)
    train(cache, start, tmp_path / "start", max_steps=1, learning_rate=1e-9)
    report = evaluate(cache, {name: tmp_path / name for name in ("start", "student", "control")}, split="test")
    first, student, _ = report.students
    assert first.agreement < 0.4
    assert student.agreement > 0.8
    assert student.metrics["f1"] > 0.7
    context = f"{WORDS[1]} {WORDS[2]} {TOPICS['film'][0]} {WORDS[3]}"
    (found,) = predict(PredictConfig(model=str(tmp_path / "student"), text=(WORDS[0],), context=context))
    assert next(iter(found.labels)) == TOPICS["film"][0]
    card = (tmp_path / "student" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(from transformers.*?)```", card, re.S)[1], {})  # the card's code runs


def test_windows_without_overlap_are_another_contract(teacher, tmp_path):
    capture(teacher, tmp_path / "cache", max_length=32)
    with pytest.raises(ContractError, match="stride"):
        capture(teacher, tmp_path / "cache", max_length=32, stride=0)
    alone = capture(teacher, tmp_path / "other", max_length=32, stride=0)
    assert alone.manifest.contract.tokenization.stride == 0


@pytest.mark.full
def test_an_adapter_learns_and_predicts(cache, tmp_path, bert_tokenizer):
    pytest.importorskip("peft")
    start = pretrained(tmp_path / "base", bert_tokenizer, seed=3, **SMALL)
    adapter = {"lora_r": 4, "lora_target": ("query", "value")}
    train(cache, start, tmp_path / "start", max_steps=1, learning_rate=1e-9, **adapter)
    train(cache, start, tmp_path / "student", max_steps=250, learning_rate=1e-2, **adapter)
    first, student = evaluate(cache, {name: tmp_path / name for name in ("start", "student")}, split="test").students
    assert student.agreement > first.agreement + 0.3
    context = f"{WORDS[1]} {TOPICS['film'][0]} {WORDS[3]}"
    (found,) = predict(PredictConfig(model=str(tmp_path / "student"), text=(WORDS[0],), context=context))
    assert next(iter(found.labels)) == TOPICS["film"][0]


@pytest.mark.full
def test_a_report_names_places_by_their_tokens_and_ranks_rows_by_what_is_known(teacher, tmp_path, bert_tokenizer):
    sampled = capture(teacher, tmp_path / "sampled", encoding=Sampled(8.0))
    start = pretrained(tmp_path / "base", bert_tokenizer, seed=3, **SMALL)
    train(sampled, start, tmp_path / "s", max_steps=100, learning_rate=3e-3)
    found = report(
        ReportConfig(
            cache=(str(sampled.root),), student=(f"s={tmp_path / 's'}",), output=str(tmp_path / "report"),
            rounds=0, resamples=200,
        )
    )  # fmt: skip
    assert all(
        re.fullmatch(r"\S+ \(\d+\)( \(\d+%\))?", each)
        for item in found.examples
        for each in (item.teacher, item.answer)
    )
    assert {item.text.partition(":")[0] for item in found.examples} <= {"start", "end"}
    for item in found.examples:  # log q / p of the teacher's most likely class agrees with the percentages
        assert not item.is_kl
        q, p = (re.search(r"(\d+)%\)$", each) for each in (item.teacher, item.answer))
        if item.teacher.rpartition(" ")[0] == item.answer.rpartition(" ")[0]:
            assert item.distance == pytest.approx(np.log(int(q[1]) / int(p[1])), abs=0.1)
    assert "nats apart on the teacher" in (tmp_path / "report" / "report.html").read_text()
    assert "nats an end" in found.divergence_note


def test_pages_show_question_text_and_ends(cache, tmp_path):
    write_page(cache, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "start: " in page
    assert re.search(r"of \d+ labelled ends", page)
    assert texts()["train"][0]["context"] in page
    lines = "\n".join(describe(cache, split="test", rows=2, tokens=8, top=2))
    assert re.search(r"start: label \S+ \(\d+\); teacher: ", lines)


def test_intervals_and_held_out_rows_keep_windows_of_a_text_together(teacher, tmp_path):
    from pipeline.evaluation.run import groups_of

    long = rows(5, 40)
    long["context"] = [" ".join([text] * 6) for text in long["context"]]
    data = DatasetDict({"train": Dataset.from_dict(long)})
    found = softlabel.cache_logits(
        str(teacher), data, tmp_path / "cache", task=TASK, columns=COLUMNS, max_length=24, stride=4
    )
    source_rows = found.dataset("train").column("source_row")
    assert len(source_rows) > 80
    assert np.array_equal(groups_of(found, "train"), source_rows)


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
    model = AutoModelForQuestionAnswering.from_config(
        AutoConfig.for_model(kind, vocab_size=len(bert_tokenizer), pad_token_id=0, **small)
    )
    found = softlabel.cache_logits(
        model, texts()["test"], tmp_path / "cache", task=TASK, columns=COLUMNS, tokenizer=bert_tokenizer, max_length=32
    )
    assert not verify(found.root).problems


def test_an_audit_finds_the_same_logits(cache, teacher):
    from pipeline.capture.audit import audit
    from pipeline.models import load_model

    report = audit(cache, load_model(get_task(TASK), str(teacher)), rows=12)
    assert report.verdict == "agrees", [(f.what, f.found, f.limit) for f in report.figures]


def test_an_answer_with_characters_that_the_normalizer_drops(bert_tokenizer):
    """Zero-width marks and line breaks at the answer's edges, also at the edges of the text."""
    for context, answer in (
        ("the cat\u200b sat", "cat\u200b"),
        ("\u200bcat sat", "\u200bcat"),
        ("the cat\u200b", "cat\u200b"),
    ):
        (row,) = windows(bert_tokenizer, "who", context, answer, max_length=32)
        first, last = row.labels.tolist()
        assert first > 0
        assert "cat" in bert_tokenizer.decode(row.input_ids[first : last + 1])


def test_answers_of_predict_stand_in_the_text(teacher, tmp_path):
    film = TOPICS["film"][0]
    asked = PredictConfig(model=str(teacher), text=(f"{film} {film}",), context=f"{WORDS[1]}, {WORDS[2]}!", top=6)
    (found,) = predict(asked)
    assert found.labels
    assert all(answer in asked.context for answer in found.labels)
    assert sum(found.labels.values()) < 1 + 1e-6


def test_the_plain_command_of_the_docs(cache, teacher, tmp_path):
    """The recipe makes all choices, with early stopping on held-out rows."""
    from pipeline.config import TrainStudentConfig
    from pipeline.training.run import run as train_student

    whole = capture(teacher, tmp_path / "whole")
    settings = TrainStudentConfig(
        cache=(str(whole.root),), student=str(teacher), output=str(tmp_path / "student"), max_steps=30
    )
    result = train_student(settings)
    assert result.eval_split == "train (held out)" or result.metrics == {}


def test_rows_labelled_elsewhere(tmp_path, bert_tokenizer):
    from pipeline.capture.labelled import LabelledRow
    from pipeline.capture.write import write_cache

    settings: dict[str, Any] = {"task": TASK, "tokenizer": bert_tokenizer, "encoding": Full(), "teacher": "elsewhere"}
    rows_given = [LabelledRow([2, 5, 3, 6, 7, 3], logits=torch.randn(2, 6), labels=[3, 4]) for _ in range(3)]
    found = write_cache(rows_given, tmp_path / "cache", max_length=16, **settings)
    assert not verify(found.root).problems
    assert found.manifest.contract.label_names == ("start", "end")
    with pytest.raises(MisuseError, match="give max_length="):
        write_cache(rows_given, tmp_path / "no", **settings)


def test_f1_of_spans():
    labels = np.array([[2, 4], [2, 4], [2, 4], [2, 4], [0, 0]])
    predicted = np.array([[2, 4], [4, 6], [5, 9], [4, 2], [0, 0]])
    assert overlap_of_spans(labels, predicted).tolist() == [1.0, 1 / 3, 0.0, 0.0, 1.0]


def test_what_is_refused(tmp_path, teacher, cache, bert_tokenizer):
    with pytest.raises(MisuseError, match="reads the question from --text-column"):
        capture(teacher, tmp_path / "a", columns=Columns(text="question", label="answers"))
    with pytest.raises(MisuseError, match="--stride is for question answering"):
        capture(teacher, tmp_path / "b", task="sequence-classification", columns=Columns(text="question"), stride=4)
    other = AutoTokenizer.from_pretrained(teacher)
    other.add_tokens(["new"])
    start = pretrained(tmp_path / "other", other, **SMALL)
    with pytest.raises(ContractError, match="the places of tokens are the teacher's"):
        train(cache, start, tmp_path / "student")
