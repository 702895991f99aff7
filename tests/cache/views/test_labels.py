"""Multi-label rows, as inspect, its page, the card, evaluate and predict show them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.cache import Cache
from pipeline.cache.views.card import make_card
from pipeline.cache.views.measures import measure
from pipeline.cache.views.page import write_page
from pipeline.cache.views.samples import sample_of, share_of_yes
from pipeline.capture.labelled import LabelledRow
from pipeline.capture.write import write_cache
from pipeline.cli import main
from pipeline.evaluation.table import format_table
from pipeline.records import NO_LABEL, EvaluationReport, Full, ModelEvaluation

NAMES = ("film", "<sport>", "tech")


@pytest.fixture
def cache(tmp_path, bert_tokenizer) -> Cache:
    """Three rows: one with a wrong prediction, one with unknown labels, one with no label set."""

    def row(text: str, logits: list[float], labels: list[int]) -> LabelledRow:
        ids = bert_tokenizer(text)["input_ids"]
        both = np.stack([np.zeros(3), np.array(logits)], -1).astype(np.float32)
        return LabelledRow(ids, both, text=text, labels=labels)

    rows = [
        row("the star ran", [3.0, -2.0, 1.0], [1, 1, NO_LABEL]),
        row("the code", [-1.0, -1.0, 2.0], [NO_LABEL] * 3),
        row("home", [-4.0, -4.0, -4.0], [0, 0, 0]),
    ]
    return write_cache(
        rows, tmp_path / "cache", task="multi-label-classification", tokenizer=bert_tokenizer, encoding=Full(), teacher="t", label_names=NAMES
    )  # fmt: skip


def test_the_share_of_yes_is_the_sigmoid(cache):
    shares = share_of_yes(cache.dataset("train")[0])
    np.testing.assert_allclose(shares, 1 / (1 + np.exp([-3.0, 2.0, -1.0])), rtol=1e-5)


def test_inspect(cache):
    output = CliRunner().invoke(main, ["inspect", "--cache", str(cache.root), "--rows", "3"]).output
    assert "multi-label-classification, 3 labels (film, <sport>, tech)" in output
    assert "train: teacher agrees with the labels on 80.0% of 5 known labels" in output
    assert "  labels film, <sport> (1 not known); teacher: film 95.3%  tech 73.1%  <sport> 11.9%" in output
    assert "  labels not known; teacher: tech 88.1%" in output
    assert "  labels none; teacher: film 1.8%" in output


def test_samples_and_disagreements(cache):
    sample = sample_of(cache, cache.dataset("train")[0], tokens=10, top=2)
    assert sample.facts == "labels film, <sport>"
    assert [(each.name, each.is_next) for each in sample.candidates] == [("film", True), ("tech", False)]
    (wrong,) = measure(cache, "train").disagreements
    assert (wrong.text, wrong.label, wrong.predicted) == ("<sport>: the star ran", 1, 0)


def test_the_page(cache, tmp_path):
    write_page(cache, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "multi-label-classification, 3 labels" in page
    assert "All 3 rows, 9 answers." in page
    assert "80.0% of 5 labelled answers" in page
    assert "&lt;sport&gt;" in page
    assert "<sport>" not in page


def test_the_card(cache):
    card = make_card(cache.manifest)
    assert "`position_labels[n]`: 1 where the row has the n-th of `label_names`" in card
    assert "A row has soft labels for each of `label_names`" in card
    assert "the classes those of `label`" not in card


def test_the_table_says_what_the_metrics_are():
    line = ModelEvaluation(
        "teacher", 10, {"f1": 0.5, "macro_f1": 0.5, "average_precision": 0.5, "accuracy": 0.5, "ece": 0.1}
    )
    text = format_table(EvaluationReport("c", "multi-label-classification", "test", 3, 9, "f1", line, (), labelled=5))
    assert "3 rows, 9 labels, 5 labelled" in text
    assert "f1: of all labels together (micro)" in text
    assert "average_precision: area under precision over recall" in text


def test_predict_gives_every_label_its_own_probability(tmp_path, bert_tokenizer):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from tests.conftest import TINY

    config = AutoConfig.for_model("bert", vocab_size=len(bert_tokenizer), pad_token_id=0, num_labels=3, **TINY["bert"])
    config.problem_type, config.id2label = "multi_label_classification", dict(enumerate(NAMES))
    config.architectures = ["BertForSequenceClassification"]
    model = AutoModelForSequenceClassification.from_config(config).eval()
    folder: Path = tmp_path / "model"
    model.save_pretrained(folder)
    bert_tokenizer.save_pretrained(folder)
    result = CliRunner().invoke(main, ["predict", "--model", str(folder), "--text", "the cat", "--json"])
    assert result.exit_code == 0, result.output
    import json

    found = json.loads(result.output.splitlines()[-1])["labels"]
    logits = model(**bert_tokenizer("the cat", return_tensors="pt")).logits[0]
    assert found == pytest.approx(dict(zip(NAMES, logits.sigmoid().tolist(), strict=True)), abs=1e-5)
