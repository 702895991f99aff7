"""The model card is correct, contains no local path, and its code runs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForTokenClassification

import pipeline as softlabel
from pipeline.cache import Cache
from pipeline.errors import MisuseError
from pipeline.models import load_model
from pipeline.records import Columns, Loss, Sampled, TopK
from pipeline.tasks import get_task
from pipeline.training.card import describe_loss, make_card
from pipeline.training.run import run
from tests.conftest import TINY, tiny_model
from tests.support.entities import TAGS, sentences
from tests.support.once import once
from tests.training.test_train import NAMES, config, student_of


@pytest.fixture
def teacher(bert_tokenizer, save_teacher):
    model = tiny_model("bert", len(bert_tokenizer), num_labels=3, spread=4.0)
    model.config.id2label, model.config.label2id = NAMES, {name: i for i, name in NAMES.items()}
    return save_teacher(model, bert_tokenizer)


@pytest.fixture
def cache(tmp_path, teacher, topics) -> Cache:
    topics["validation"] = topics["test"]

    def make(folder: Path) -> None:
        softlabel.cache_logits(str(teacher), topics, folder / "cache", task="sequence-classification")

    once(__name__, make, tmp_path)
    return Cache.open(tmp_path / "cache")


def test_a_card_says_what_a_student_was_made_from(tmp_path, cache, teacher):
    student = student_of(teacher, tmp_path / "init")
    result = run(config(cache, student, tmp_path / "out", hard_weight=0.25, soft_weight=0.75, temperature=3.0))
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == "transformers"
    data = card.data.to_dict()
    assert (data["teacher"], data["cache_id"]) == ("teacher", cache.manifest.cache_id)
    for key in (
        "base_model",
        "datasets",
        "license",
    ):  # no model is on the hub, and no licence is given
        assert key not in data
    for expected in (
        "business, sport, film",
        f"{cache.manifest.contract.teacher.num_parameters:,} parameters",
        cache.manifest.contract.teacher.weights_sha256[:16],
        "| loss | 0.25 * cross-entropy with the data's labels + 0.75 * T^2 * forward-kl from the teacher at T = 3 |",
        "5 steps, learning rate 0.001, seed 0",
        "split `train`: 90 rows of at most 64 tokens",
        "| initial weights | `init` |",
        "split `validation`",
    ):
        assert expected in text, expected
    for path in (tmp_path, Path.cwd(), Path.home()):
        assert str(path) not in text
    assert not re.search(r"\w/\w", re.sub(r"T\^2|https?://\S+", "", text.replace("row/", "")))  # no path at all
    assert result.max_length == 64


def test_its_metrics_are_those_of_the_evaluation(tmp_path, cache, teacher):
    student = student_of(teacher, tmp_path / "init")
    result = run(config(cache, student, tmp_path / "out", max_steps=20, learning_rate=1e-2))
    line = softlabel.evaluate(cache, {"s": tmp_path / "out"}, split="validation").students[0]
    assert result.eval_split == "validation"
    assert result.metrics["accuracy"] == line.metrics["accuracy"]
    assert result.metrics["nll"] == pytest.approx(line.metrics["loss"], rel=1e-4)
    assert result.metrics["agreement"] == line.agreement
    assert f"| nll | {line.metrics['loss']:.4f} |" in (tmp_path / "out" / "README.md").read_text()
    kept = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert kept["metrics"] == result.metrics


def test_without_a_validation_split_nothing_is_claimed(tmp_path, teacher, topics):
    cache = softlabel.cache_logits(str(teacher), topics, tmp_path / "c", task="sequence-classification")
    result = run(config(cache, student_of(teacher, tmp_path / "init"), tmp_path / "out"))
    assert (result.eval_split, result.metrics) == (None, {})
    assert "It was not evaluated during training" in (tmp_path / "out" / "README.md").read_text()


def test_a_control_is_called_one(tmp_path, cache, teacher):
    student = student_of(teacher, tmp_path / "init")
    run(config(cache, student, tmp_path / "a", hard_weight=1.0, soft_weight=0.0))
    text = (tmp_path / "a" / "README.md").read_text()
    assert "A control beside students of `teacher`" in text
    assert "repeat its teacher" not in text
    run(config(cache, student, tmp_path / "b", hard_weight=1.0, soft_weight=0.0, hard_labels="teacher"))
    text = (tmp_path / "b" / "README.md").read_text()
    assert "on the teacher's most likely classes" in text
    assert "cross-entropy with the teacher's labels" in text


def test_licences_come_from_the_cards_that_name_one(tmp_path, cache, teacher):
    student = student_of(teacher, tmp_path / "init")
    (student / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Start\n")
    plain = (cache.root / "README.md").read_text()
    (cache.root / "README.md").write_text(plain.replace("---\n", "---\nlicense: cc-by-4.0\n", 1))
    run(config(cache, student, tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| the cache | cc-by-4.0 |" in text
    assert "| the initial model, `init` | apache-2.0 |" in text
    assert "| the teacher, `teacher` | unknown" in text
    for broken in ("---\n- a list\n---\n", "---\nlicense: [\n---\n", "no front matter"):
        (student / "README.md").write_text(broken)
        loaded = load_model(get_task("sequence-classification"), str(student))
        card = make_card(cache, loaded, _result(tmp_path / "out"), splits=("train",), teacher_labels=False)
        assert "`init` | unknown" in card


def _result(output: Path):
    from pipeline.cache.format.manifest import parse
    from pipeline.records import TrainResult

    return parse(TrainResult, output / "distillation.json")


def test_names_of_the_hub_are_linked_and_labels_cannot_break_the_table(tmp_path, cache, teacher):
    run(config(cache, student_of(teacher, tmp_path / "init"), tmp_path / "out"))
    contract = cache.manifest.contract
    hostile = ("a|b", "<script>alert(1)</script>", "two\nlines", *(f"label {i}" for i in range(50)))
    other = dataclasses.replace(
        contract,
        label_names=hostile,
        teacher=dataclasses.replace(contract.teacher, name="org/teacher", revision="abc123"),
        source=dataclasses.replace(contract.source, name="org/data", revision="def456"),
        encoding=TopK(7, (1.0, 2.0)),
    )
    moved = Cache(cache.root, dataclasses.replace(cache.manifest, contract=other))
    loaded = load_model(get_task(contract.task), str(tmp_path / "init"))
    card = ModelCard(make_card(moved, loaded, _result(tmp_path / "out"), splits=("train",), teacher_labels=False))
    assert card.data.base_model == "org/teacher"
    assert card.data.datasets == ["org/data"]
    assert "<script>" not in card.text
    row = next(line for line in card.text.splitlines() if line.startswith("| labels |"))
    assert row.startswith(r"| labels | a\|b, \<script\>alert(1)\</script\>, two lines, label 0")
    assert row.endswith("and 33 more |")
    assert "top-k, k 7, temperatures 1, 2" in card.text
    start = dataclasses.replace(loaded, name="org/start", revision="789")
    card = ModelCard(make_card(moved, start, _result(tmp_path / "out"), splits=("train",), teacher_labels=False))
    assert card.data.base_model == "org/start"


def test_language_models_and_adapters(tmp_path, lm_tokenizer, documents, save_teacher):
    path = save_teacher(tiny_model("llama", len(lm_tokenizer), spread=4.0), lm_tokenizer)
    cache = softlabel.cache_logits(
        str(path), documents, tmp_path / "c", task="causal-lm", max_length=32, encoding=Sampled(8.0)
    )
    student = softlabel.init_student(path, tmp_path / "init", layers=[0, 1])
    run(config(cache, student, tmp_path / "full"))
    text = (tmp_path / "full" / "README.md").read_text()
    assert ModelCard(text).data.pipeline_tag == "text-generation"
    assert "sampled, sample size 8.0, temperature 1.0" in text
    run(config(cache, student, tmp_path / "adapter", lora_r=2))
    text = (tmp_path / "adapter" / "README.md").read_text()  # PEFT's default card contains the base model's path
    assert str(tmp_path) not in text
    assert ModelCard(text).data.library_name == "peft"
    assert "of which" in text


def test_a_card_of_word_labels_says_what_is_counted(tmp_path, bert_tokenizer, save_teacher):
    shape = AutoConfig.for_model(
        "bert", vocab_size=len(bert_tokenizer), pad_token_id=0, num_labels=len(TAGS), **TINY["bert"]
    )
    shape.id2label, shape.label2id = dict(enumerate(TAGS)), {name: i for i, name in enumerate(TAGS)}
    teacher = save_teacher(AutoModelForTokenClassification.from_config(shape), bert_tokenizer)
    rows = sentences()
    rows["validation"] = rows.pop("test")
    columns = Columns(text=None, words="tokens", label="ner_tags")
    cache = softlabel.cache_logits(str(teacher), rows, tmp_path / "cache", task="token-classification", columns=columns)
    result = run(config(cache, teacher, tmp_path / "out", max_steps=2))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| f1 | {result.metrics['f1']:.4f} |" in card
    assert "`f1`, `precision` and `recall` are of entities" in card
    assert "split them, or do not rely on the result" in card
    assert "as above" not in card


def test_the_code_of_a_card_runs(tmp_path, cache, teacher, lm_tokenizer, documents, save_teacher, monkeypatch, capsys):
    run(config(cache, student_of(teacher, tmp_path / "init"), tmp_path / "classifier"))
    path = save_teacher(tiny_model("llama", len(lm_tokenizer), spread=4.0), lm_tokenizer, "lm")
    tokens = softlabel.cache_logits(str(path), documents, tmp_path / "c", task="causal-lm", max_length=32)
    run(config(tokens, softlabel.init_student(path, tmp_path / "lm-init", layers=[0]), tmp_path / "lm-student"))
    monkeypatch.chdir(tmp_path)
    for folder, printed in (("classifier", "'label': '"), ("lm-student", "A text")):
        (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / folder / "README.md").read_text(), re.DOTALL)
        capsys.readouterr()
        exec(compile(code, folder, "exec"), {})
        assert printed in capsys.readouterr().out


def test_a_card_of_somebody_elses_is_not_overwritten(tmp_path, cache, teacher):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    student = student_of(teacher, tmp_path / "init")
    with pytest.raises(MisuseError, match="a model card that train-student has not made"):
        run(config(cache, student, tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (Loss(1.0, 0.0), "1 * cross-entropy with the data's labels"),
        (Loss(0.0, 1.0, 2.0, "total-variation"), "1 * T * total-variation from the teacher at T = 2"),
        (Loss(0.0, 0.5, 2.0, "logit-mse"), "0.5 * logit-mse from the teacher"),
        (
            Loss(0.0, 1.0, 1.0, schedule="linear", hard_weight_end=1.0, soft_weight_end=0.0),
            "(0 to 1) * cross-entropy with the data's labels + (1 to 0) * T^2 * forward-kl from the teacher at T = 1 (weights change over the run: linear)",
        ),
        (
            Loss(0.5, 0.5, 2.0, "jensen-shannon", position_weights="certainty"),
            "0.5 * cross-entropy with the data's labels + 0.5 * T^2 * jensen-shannon from the teacher at T = 2, the teacher's share in the mixture 0.5, "
            "positions weighted by the teacher's certainty",
        ),
        (
            Loss(0.0, 1.0, 1.0, "skewed-kl", tail="renormalize", mixture=0.2),
            "1 * T^2 * skewed-kl from the teacher at T = 1, the teacher's share in the mixture 0.2, classes outside the top: renormalize",
        ),
        (
            Loss(0.5, 0.0, span_weight=0.25),
            "0.5 * cross-entropy with the data's labels + 0.25 * binary KL from the teacher over aligned spans at tau = 100",
        ),
    ],
)
def test_losses_in_words(loss, text):
    assert describe_loss(loss) == text
