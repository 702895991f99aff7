"""A student's initialisation is determined from a file of `init-student` or from its weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import pipeline as softlabel
from pipeline.errors import ModelError
from pipeline.models.initialize import make_student
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


def test_layers_of_another_kind_do_not_fit_in_the_place_of_the_first(lm_tokenizer, tmp_path):
    """The model's first layer is dense, the others are mixtures of experts."""
    config = AutoConfig.for_model(
        "qwen2_moe", vocab_size=len(lm_tokenizer), hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2,
        shared_expert_intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2, mlp_only_layers=[0],
    )  # fmt: skip
    teacher = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=r"layers 2, 3 do not fit in their new places.* such as model.layers.0.mlp"):
        make_student(teacher, tmp_path / "a", layers=(2, 3), tokenizer=lm_tokenizer)
    assert make_student(teacher, tmp_path / "b", layers=(0, 3), tokenizer=lm_tokenizer).layers == (0, 3)
