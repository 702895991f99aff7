"""A student with an adapter: its files contain every weight that was not loaded from a file."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from pipeline.config import TrainStudentConfig
from pipeline.errors import MisuseError
from pipeline.models import LABELS, load_model
from pipeline.tasks import get_task
from pipeline.training.student import add_adapter
from tests.conftest import TINY, tiny_model

pytest.importorskip("peft")
CLASSES, TOKENS = get_task("sequence-classification"), get_task("causal-lm")
NAMES = ("sport", "film", "business")
IDS = torch.randint(2, 100, (2, 9), generator=torch.Generator().manual_seed(0))


def settings(path, **more):
    return TrainStudentConfig(cache=("none",), student=str(path), output="none", lora_r=2, **more)


def pretrained(kind, tokenizer):
    """Save a model with its pretraining head, without a classifier or pooler."""
    auto_class = AutoModelForCausalLM if kind in ("gpt2", "llama") else AutoModelForMaskedLM
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), pad_token_id=0, **TINY[kind])
    return auto_class.from_config(config)


def saved_and_loaded(task, student, path):
    """Return the logits of a trained adapter, and those after loading its directory."""
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    student.model.save_pretrained(path)
    student.tokenizer.save_pretrained(path)
    (path / LABELS).write_text(json.dumps(NAMES)) if task is CLASSES else None
    found = load_model(task, str(path)).model
    with torch.inference_mode():
        return student.model.eval()(input_ids=IDS).logits, found(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "deberta-v2", "gpt2", "llama"])
def test_a_new_head_is_saved_with_the_adapter(tmp_path, bert_tokenizer, lm_tokenizer, save_teacher, kind):
    tokenizer = lm_tokenizer if kind in ("gpt2", "llama") else bert_tokenizer
    path = save_teacher(pretrained(kind, tokenizer), tokenizer, kind)
    loaded = load_model(CLASSES, str(path), dtype="float32", label_names=NAMES, new_head=True, trainable=True)
    target = {"distilbert": ("q_lin",), "deberta-v2": ("query_proj",)}.get(kind, ())
    student = add_adapter(CLASSES, loaded, settings(path, lora_target=target))
    trained = {name for name, weight in student.model.named_parameters() if weight.requires_grad}
    kept = {name.replace(".modules_to_save.default.", ".").removeprefix("base_model.model.") for name in trained}
    assert loaded.new_weights
    assert set(loaded.new_weights) <= kept
    torch.testing.assert_close(*saved_and_loaded(CLASSES, student, tmp_path / "a"), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_target_within_a_new_head_is_trained_whole(tmp_path, bert_tokenizer, save_teacher, kind):
    path = save_teacher(pretrained(kind, bert_tokenizer), bert_tokenizer, kind)
    loaded = load_model(CLASSES, str(path), dtype="float32", label_names=NAMES, new_head=True, trainable=True)
    student = add_adapter(CLASSES, loaded, settings(path, lora_target=("dense",)))
    torch.testing.assert_close(*saved_and_loaded(CLASSES, student, tmp_path / "a"), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_language_models_have_nothing_new(tmp_path, lm_tokenizer, save_teacher, kind):
    path = save_teacher(tiny_model(kind, len(lm_tokenizer)), lm_tokenizer, kind)
    loaded = load_model(TOKENS, str(path), dtype="float32", trainable=True)
    student = add_adapter(TOKENS, loaded, settings(path))
    assert loaded.new_weights == ()
    assert student.model.peft_config["default"].modules_to_save is None
    torch.testing.assert_close(*saved_and_loaded(TOKENS, student, tmp_path / "a"), rtol=0, atol=0)


def test_an_adapter_gets_no_second_one(tmp_path, lm_tokenizer, save_teacher):
    path = save_teacher(tiny_model("llama", len(lm_tokenizer)), lm_tokenizer, "lm")
    add_adapter(TOKENS, load_model(TOKENS, str(path)), settings(path)).model.save_pretrained(tmp_path / "a")
    with pytest.raises(MisuseError, match="is an adapter already"):
        add_adapter(TOKENS, load_model(TOKENS, str(tmp_path / "a"), trainable=True), settings(path))
