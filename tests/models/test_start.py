"""How a student begins is known from what `init-student` left, or from its weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import pipeline as softlabel
from pipeline.models.start import start_of
from tests.conftest import tiny_model


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_new_model_is_told_from_a_trained_one(kind):
    model = tiny_model(kind, 50)
    assert start_of(model, "org/name") == "random"
    with torch.no_grad():
        next(module for module in model.modules() if type(module).__name__.endswith("Norm")).weight[0] += 1e-3
    assert start_of(model, "org/name") == "pretrained"


def test_init_student_says_how_a_student_begins(tmp_path, bert_tokenizer, save_teacher):
    teacher = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=3), bert_tokenizer)
    copied = softlabel.init_student(teacher, tmp_path / "copied")
    shaped = softlabel.init_student(teacher, tmp_path / "shaped", config=softlabel.Shape(1, 16, 2))
    load = AutoModelForSequenceClassification.from_pretrained
    assert start_of(load(copied), str(copied)) == "layers"
    assert start_of(load(shaped), str(shaped)) == "random"


def test_an_adapter_is_one_whatever_it_is_around(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama", 50), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert start_of(model, str(tmp_path)) == "adapter"


def test_a_file_that_is_no_json_is_passed_over(tmp_path):
    tiny_model("llama", 50).save_pretrained(tmp_path)
    (tmp_path / "student-start.json").write_text("{")
    assert start_of(AutoModelForCausalLM.from_pretrained(tmp_path), str(tmp_path)) == "random"
