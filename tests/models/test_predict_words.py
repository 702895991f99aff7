"""`softlabel predict` labels each word with the model's prediction at its first token."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForTokenClassification, set_seed

from pipeline.cli import main
from pipeline.config import PredictConfig
from pipeline.errors import SourceError
from pipeline.models.predict import run
from tests.conftest import TINY

NAMES = {0: "O", 1: "B-PET", 2: "I-PET"}
TEXTS = ("the cat sat.", "dog", "the bird flew over the old stone")


@pytest.fixture
def model(bert_tokenizer, save_teacher):
    set_seed(0)
    config = AutoConfig.for_model("bert", vocab_size=len(bert_tokenizer), pad_token_id=0, num_labels=3, **TINY["bert"])
    found = AutoModelForTokenClassification.from_config(config).eval()
    with torch.no_grad():
        found.classifier.weight.mul_(40)
    found.config.id2label, found.config.label2id = NAMES, {name: i for i, name in NAMES.items()}
    return found, save_teacher(found, bert_tokenizer)


def test_a_line_a_word_as_the_model_says_at_its_first_token(model, bert_tokenizer):
    loaded, path = model
    found = list(run(PredictConfig(model=str(path), text=TEXTS)))
    assert [[each.word for each in one.words] for one in found] == [
        ["the", "cat", "sat", "."], ["dog"], ["the", "bird", "flew", "over", "the", "old", "stone"]
    ]  # fmt: skip
    for one in found:
        words = [each.word for each in one.words]
        encoded = bert_tokenizer(words, is_split_into_words=True, return_tensors="pt")
        with torch.inference_mode():
            probabilities = torch.softmax(loaded(**encoded).logits[0], -1)
        for n, each in enumerate(one.words):
            values = probabilities[encoded.word_ids().index(n)]
            assert each.label == NAMES[int(values.argmax())]
            assert each.probability == pytest.approx(float(values.max()), abs=1e-5)
        assert one.labels == {}


def test_lines_and_json(model):
    _, path = model
    shown = CliRunner().invoke(main, ["predict", "--model", str(path), "--text", TEXTS[0]])
    assert shown.exit_code == 0, shown.output
    first, *lines = shown.stdout.splitlines()
    assert first == "'the cat sat.'"
    assert [line.split()[0] for line in lines] == ["the", "cat", "sat", "."]
    assert all(line.split()[1] in NAMES.values() and line.endswith("%") for line in lines)
    printed = CliRunner().invoke(main, ["predict", "--model", str(path), "--json", "--text", "dog"])
    said = json.loads(printed.stdout)
    assert list(said) == ["text", "words"]
    assert [list(each) for each in said["words"]] == [["word", "label", "probability"]]


def test_words_beyond_the_longest_text_are_counted(model, caplog):
    _, path = model
    found = list(run(PredictConfig(model=str(path), text=TEXTS, max_length=4)))
    assert [len(one.words) for one in found] == [2, 1, 2]
    (message,) = (record.getMessage() for record in caplog.records if "were cut" in record.getMessage())
    assert message.startswith("2 of 3 texts were cut to 4 tokens")
    caplog.clear()
    list(run(PredictConfig(model=str(path), text=TEXTS, max_length=60)))
    assert "were cut" not in caplog.text


def test_a_text_without_a_word_that_fits_is_named(model):
    _, path = model
    with pytest.raises(SourceError, match="text 1: no word is left within --max-length 2"):
        list(run(PredictConfig(model=str(path), text=("dog", "cat"), max_length=2)))
