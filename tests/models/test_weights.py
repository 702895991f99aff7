"""Every weight comes from a file: checkpoints and adapters that lack some, or hold too many."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from pipeline.cache.format.manifest import dump
from pipeline.errors import MisuseError, ModelError
from pipeline.models import load_model, model_info
from pipeline.models.detect import detect_task
from pipeline.tasks import get_task
from tests.conftest import tiny_model

peft = pytest.importorskip("peft")
CLASSES, TOKENS = get_task("sequence-classification"), get_task("causal-lm")
ADAPTERS = {
    "lora": lambda **more: peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"], **more),
    "dora": lambda **more: peft.LoraConfig(
        r=2, use_dora=True, init_lora_weights=False, target_modules=["q_proj"], **more
    ),
    "ia3": lambda **more: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **more
    ),
    "prefix": lambda **more: peft.PrefixTuningConfig(num_virtual_tokens=3, **more),
}


@pytest.fixture
def bert(bert_tokenizer, save_teacher):
    return save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=2), bert_tokenizer, "bert")


@pytest.fixture
def llama(lm_tokenizer, save_teacher):
    return save_teacher(tiny_model("llama", len(lm_tokenizer)), lm_tokenizer, "llama")


def adapter_of(path, model, tokenizer, settings):
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return adapted.eval()


def rewrite(path, change, file="model.safetensors"):
    save_file(change(load_file(path / file)), path / file, metadata={"format": "pt"})


def test_layers_that_the_configuration_has_no_place_for(bert):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ModelError, match=r"holds 16 weights .* no place for .*bert\.encoder\.layer\.2\."):
        load_model(CLASSES, str(bert))
    with pytest.raises(ModelError, match="no place for"):
        load_model(CLASSES, str(bert), new_head=True)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
@pytest.mark.parametrize("new_head", [True, False])
def test_prefixes_of_wrappers_are_named(bert, prefix, new_head):
    rewrite(bert, lambda weights: {prefix + name: tensor for name, tensor in weights.items()})
    with pytest.raises(ModelError, match=rf"carry the prefix {prefix} .*model\.{prefix}save_pretrained"):
        load_model(CLASSES, str(bert), new_head=new_head)


@pytest.mark.parametrize(
    ("task", "extra"),
    [
        ("bert", "cls.predictions.transform.dense.weight"),
        ("bert", "bert.embeddings.position_ids"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama", "value_head.weight"),
    ],
)
def test_other_heads_and_computed_buffers_are_left_out(request, task, extra):
    path = request.getfixturevalue(task)
    rewrite(path, lambda weights: {**weights, extra: torch.ones(2)})
    load_model(CLASSES if task == "bert" else TOKENS, str(path))


@pytest.mark.parametrize("extra", ["model.layers.0.self_attn.q_proj.bias", "lm_head.bias"])
def test_a_weight_of_a_module_that_uses_none_is_refused(llama, extra):
    rewrite(llama, lambda weights: {**weights, extra: torch.ones(2)})
    with pytest.raises(ModelError, match="no place for"):
        load_model(TOKENS, str(llama))


def test_a_language_model_gets_a_new_classifier(llama, bert_tokenizer, save_teacher):
    loaded = load_model(CLASSES, str(llama), new_head=True, label_names=("a", "b"))
    assert loaded.new_weights == ("score.weight",)
    with pytest.raises(ModelError, match="lacks 1 weights"):
        load_model(CLASSES, str(llama))


@pytest.mark.parametrize("kind", sorted(ADAPTERS))
def test_adapters_give_what_they_gave_when_they_were_saved(tmp_path, llama, lm_tokenizer, kind):
    base = load_model(TOKENS, str(llama)).model
    saved = adapter_of(tmp_path / "a", base, lm_tokenizer, ADAPTERS[kind](task_type="CAUSAL_LM"))
    ids = torch.randint(2, 300, (1, 9))
    found = load_model(TOKENS, str(tmp_path / "a")).model
    with torch.inference_mode():
        assert torch.equal(found(input_ids=ids).logits, saved(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapter_files_that_do_not_match(tmp_path, llama, lm_tokenizer, kind):
    base = load_model(TOKENS, str(llama)).model
    path, file = tmp_path / "a", "adapter_model.safetensors"
    adapter_of(path, base, lm_tokenizer, ADAPTERS[kind](task_type="CAUSAL_LM"))
    for name in ("other", "fewer", "empty"):
        shutil.copytree(path, tmp_path / name)
    rewrite(tmp_path / "other", lambda w: {k.replace(".layers.", ".language.layers."): v for k, v in w.items()}, file)
    rewrite(tmp_path / "fewer", lambda w: dict(sorted(w.items())[1:]), file)
    rewrite(tmp_path / "empty", lambda w: {}, file)
    with pytest.raises(ModelError, match="match no module"):
        load_model(TOKENS, str(tmp_path / "other"))
    with pytest.raises(ModelError, match="file lacks 1 of the weights"):
        load_model(TOKENS, str(tmp_path / "fewer"))
    with pytest.raises(ModelError, match="holds no weights"):
        load_model(TOKENS, str(tmp_path / "empty"))


def test_an_adapter_brings_the_head_or_is_refused(tmp_path, llama, lm_tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2)
    saved = adapter_of(tmp_path / "with", model, lm_tokenizer, ADAPTERS["lora"](task_type="SEQ_CLS"))
    ids = torch.randint(2, 300, (1, 9))
    found = load_model(CLASSES, str(tmp_path / "with")).model
    with torch.inference_mode():
        assert torch.equal(found(input_ids=ids).logits, saved(input_ids=ids).logits)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2)
    adapter_of(tmp_path / "without", model, lm_tokenizer, ADAPTERS["lora"]())
    for new_head in (True, False):
        with pytest.raises(ModelError, match=r"neither the adapter nor its base model .*score\.weight"):
            load_model(CLASSES, str(tmp_path / "without"), new_head=new_head)


@pytest.mark.parametrize("named", [None, "", "/nowhere/at/all"])
def test_base_model_replaces_the_base_that_an_adapter_names(tmp_path, llama, lm_tokenizer, named):
    adapter_of(tmp_path / "a", load_model(TOKENS, str(llama)).model, lm_tokenizer, ADAPTERS["lora"]())
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": named}))
    with pytest.raises(ModelError, match=r"base model.*--base-model"):
        load_model(TOKENS, str(tmp_path / "a"))
    loaded = load_model(TOKENS, str(tmp_path / "a"), base_model=str(llama))
    assert loaded.base_model == str(llama)
    with pytest.raises(ModelError, match="is an adapter itself"):
        load_model(TOKENS, str(tmp_path / "a"), base_model=str(tmp_path / "a"))
    with pytest.raises(MisuseError, match=r"--base-model .* is for PEFT adapters"):
        load_model(TOKENS, str(llama), base_model=str(llama))


def test_the_base_that_was_asked_for_is_named_without_its_path(tmp_path, llama, lm_tokenizer, monkeypatch):
    adapter_of(tmp_path / "a", load_model(TOKENS, str(llama)).model, lm_tokenizer, ADAPTERS["lora"]())
    monkeypatch.setenv("HOME", str(tmp_path))
    plain = model_info(load_model(TOKENS, "~/a"))
    asked = load_model(TOKENS, "~/a", base_model="~/llama")
    assert (plain.base_model, model_info(asked).base_model) == (None, "llama")
    assert "base_model" not in dump(plain)
    assert '"base_model": "llama"' in dump(model_info(asked))
    asked.model.save_pretrained(tmp_path / "again")
    said = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(llama)
    assert detect_task("~/a", base_model="~/llama") is TOKENS  # no task_type: the base says it
