"""An adapter on the hub is loaded and inspected in the same way as one in a directory."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import ModelError
from pipeline.models import load_model, model_info
from pipeline.models.adapters import LABELS
from pipeline.models.detect import detect_task
from pipeline.tasks import get_task
from tests.conftest import tiny_model
from tests.support.hub import hub  # noqa: F401 - a fixture

peft = pytest.importorskip("peft")
CLASSES, TOKENS = get_task("sequence-classification"), get_task("causal-lm")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(hub, tmp_path, lm_tokenizer, save_teacher):
    """The directory of a LoRA adapter whose base model is on the hub."""
    base = save_teacher(tiny_model("llama", len(lm_tokenizer)), lm_tokenizer, "base")
    hub.hold("org/base", base)
    settings = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    peft.get_peft_model(load_model(TOKENS, str(base)).model, settings).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "org/base"}))
    (tmp_path / "adapter" / "README.md").unlink()
    return tmp_path / "adapter"


def test_an_adapter_on_the_hub_is_that_of_its_directory(hub, adapter, lm_tokenizer):
    commit = hub.hold("org/adapter", adapter)
    hub.hold("org/adapter", adapter)  # the same content in another commit
    found, local = load_model(TOKENS, "org/adapter", revision=commit), load_model(TOKENS, str(adapter))
    ids = torch.randint(2, 300, (1, 9))
    with torch.inference_mode():
        assert torch.equal(found.model(input_ids=ids).logits, local.model(input_ids=ids).logits)
    assert model_info(found).weights_sha256 == model_info(local).weights_sha256
    assert model_info(found).adapter_sha256 == model_info(local).adapter_sha256 is not None
    assert (found.revision, model_info(found).name) == (commit, "org/adapter")
    assert load_model(TOKENS, "org/adapter").revision == hub.branches["org/adapter", "main"] != commit
    assert detect_task("org/adapter") is TOKENS
    assert found.tokenizer("the cat")["input_ids"] == lm_tokenizer("the cat")["input_ids"]  # the base's tokenizer


def test_another_base_and_labels_on_the_hub(hub, adapter, tmp_path, bert_tokenizer, save_teacher):
    base = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=2), bert_tokenizer, "bert")
    model = load_model(CLASSES, str(base)).model
    peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2)).save_pretrained(tmp_path / "classes")
    (tmp_path / "classes" / LABELS).write_text(json.dumps(["no", "yes"]))
    bert_tokenizer.save_pretrained(tmp_path / "classes")
    hub.hold("org/classes", tmp_path / "classes")
    found = load_model(CLASSES, "org/classes", base_model=str(base))
    assert found.model.config.id2label == {0: "no", 1: "yes"}
    assert found.tokenizer("the cat")["input_ids"] == bert_tokenizer("the cat")["input_ids"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k.replace(".layers.", ".language.layers."): v for k, v in w.items()}, "match no module"),
        (lambda w: dict(sorted(w.items())[1:]), "file lacks 1 of the weights"),
        (lambda w: {}, "holds no weights"),
        (None, f"org/adapter: expected {WEIGHTS}"),
    ],
)
def test_an_adapter_on_the_hub_that_does_not_match_is_refused(hub, adapter, change, message):
    if change is None:
        (adapter / WEIGHTS).unlink()
    else:
        save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)
    hub.hold("org/adapter", adapter)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(TOKENS, "org/adapter")
    assert "\n" not in str(caught.value)


def test_a_name_that_the_hub_does_not_have_is_one_line(hub):
    with pytest.raises(ModelError, match="org/nothing: cannot be loaded"):
        load_model(TOKENS, "org/nothing")
