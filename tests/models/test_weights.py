"""Checkpoints and adapters that lack weights or hold unknown ones are refused."""

from __future__ import annotations

import json
import random
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from pipeline.cache.format.manifest import dump
from pipeline.errors import MisuseError, ModelError
from pipeline.models import load_model, model_info
from pipeline.models.detect import detect_task
from pipeline.records import TokenizedExample
from pipeline.tasks import get_task
from tests.conftest import tiny_model

peft = pytest.importorskip("peft")
CLASSES, TOKENS = get_task("sequence-classification"), get_task("causal-lm")
ADAPTERS = {
    "lora": lambda **more: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **more),
    "dora": lambda **more: peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], **more),
    "saved": lambda **more: peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], **more),
    "embedding": lambda **more: peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], **more),
    "tokens": lambda **more: peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5], **more),
    "ia3": lambda **more: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **more
    ),
    "prefix": lambda **more: peft.PrefixTuningConfig(num_virtual_tokens=3, **more),
    "prompt": lambda **more: peft.PromptTuningConfig(num_virtual_tokens=3, **more),
    "p-tuning": lambda **more: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **more),
}
PROMPTS = ("prompt", "p-tuning")
TYPES = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
#: Changes to a file's weights that must be refused.
WRONG = {
    "missing": lambda weights, key: {k: v for k, v in weights.items() if k != key},
    "renamed": lambda weights, key: {("x." + k if k == key else k): v for k, v in weights.items()},
    "too many": lambda weights, key: {**weights, "x." + key: weights[key].clone()},
    "empty": lambda weights, key: {},
}


@pytest.fixture
def bert(bert_tokenizer, save_teacher):
    return save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=2), bert_tokenizer, "bert")


@pytest.fixture
def llama(lm_tokenizer, save_teacher):
    return save_teacher(tiny_model("llama", len(lm_tokenizer)), lm_tokenizer, "llama")


def adapter_of(path, model, tokenizer, settings):
    """Save an adapter to `path` and return it, with random noise added to each trained weight."""
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        adapted.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return adapted.eval()


def rewrite(path, change, file="model.safetensors"):
    save_file(change(load_file(path / file)), path / file, metadata={"format": "pt"})


def test_layers_that_the_configuration_has_no_place_for(bert):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ModelError, match=r"holds 16 weights .* does not have .*bert\.encoder\.layer\.2\."):
        load_model(CLASSES, str(bert))
    with pytest.raises(ModelError, match="does not have under"):
        load_model(CLASSES, str(bert), new_head=True)


FAMILIES = ["bert", "roberta", "deberta-v2", "gpt2", "llama", "qwen3", "gemma2"]


@pytest.mark.parametrize(
    ("task", "kind"), [*((CLASSES, kind) for kind in FAMILIES), *((TOKENS, kind) for kind in FAMILIES[3:])]
)
def test_of_every_family_the_logits_are_the_models_or_the_load_is_refused(
    tmp_path, bert_tokenizer, lm_tokenizer, save_teacher, kind, task
):
    """Covers weights that are missing, renamed, or belong to a layer that does not exist."""
    tokenizer = lm_tokenizer if kind in FAMILIES[3:] else bert_tokenizer
    labels = {"num_labels": 3} if task is CLASSES else {}
    path = save_teacher(tiny_model(kind, len(tokenizer), spread=2.0, **labels), tokenizer)
    plain = task.auto_class.from_pretrained(path).eval()
    ids = torch.randint(5, 100, (2, 9))
    with torch.inference_mode():
        assert torch.equal(load_model(task, str(path)).model(input_ids=ids).logits, plain(input_ids=ids).logits)
    file = path / "model.safetensors"
    right = load_file(file)
    for key in random.Random(kind).sample(sorted(right), 6):
        for change in ("missing", "renamed"):
            save_file(WRONG[change](right, key), file, metadata={"format": "pt"})
            with pytest.raises(ModelError, match=r"lacks \d weights"):
                load_model(task, str(path))
    layer = {re.sub(r"\.0\.", ".9.", key, count=1): right[key].clone() for key in right if ".0." in key}
    save_file({**right, **layer}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not have under"):
        load_model(task, str(path))


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
    with pytest.raises(ModelError, match="does not have under"):
        load_model(TOKENS, str(llama))


def test_a_language_model_gets_a_new_classifier(llama, bert_tokenizer, save_teacher):
    loaded = load_model(CLASSES, str(llama), new_head=True, label_names=("a", "b"))
    assert loaded.new_weights == ("score.weight",)
    with pytest.raises(ModelError, match="lacks 1 weights"):
        load_model(CLASSES, str(llama))


def plain_and_ours(task, base, path, ids):
    """Logits of an adapter loaded by PEFT alone, and loaded by `load_model`."""
    plain = peft.PeftModel.from_pretrained(task.auto_class.from_pretrained(base), str(path)).eval()
    with torch.inference_mode():
        return plain(input_ids=ids).logits, load_model(task, str(path)).model(input_ids=ids).logits


@pytest.mark.parametrize("kind", sorted(set(ADAPTERS) - set(PROMPTS)))
@pytest.mark.parametrize("task", TYPES)
def test_adapters_give_what_peft_gives_and_other_keys_are_refused(tmp_path, lm_tokenizer, save_teacher, task, kind):
    labels = {"num_labels": 2} if task == "sequence-classification" else {}
    base = save_teacher(tiny_model("llama", len(lm_tokenizer), **labels), lm_tokenizer, "base")
    task, settings = get_task(task), ADAPTERS[kind](task_type=TYPES[task])
    adapter_of(tmp_path / "a", load_model(task, str(base)).model, lm_tokenizer, settings)
    plain, ours = plain_and_ours(task, base, tmp_path / "a", torch.randint(2, 300, (2, 9)))
    assert torch.equal(plain, ours)

    file = tmp_path / "a" / "adapter_model.safetensors"
    right = load_file(file)
    for what, change in WRONG.items():
        # The adapter's copy of the base embedding may be missing, as the base has its own.
        for key in [key for key in sorted(right) if "embed_tokens.base_layer" not in key][:: max(1, len(right) - 2)]:
            save_file(change(right, key), file)
            with pytest.raises(ModelError, match=r"file lacks|match no module|holds no weights") as caught:
                load_model(task, str(tmp_path / "a"))
            assert "\n" not in str(caught.value), what


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_biases_that_an_adapter_was_trained_with(tmp_path, bert, bert_tokenizer, bias):
    """Trained biases are saved under the base model's names, and PEFT saves some of them twice."""
    settings = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"], bias=bias)
    adapter_of(tmp_path / "a", load_model(CLASSES, str(bert)).model, bert_tokenizer, settings)
    plain, ours = plain_and_ours(CLASSES, bert, tmp_path / "a", torch.randint(5, 100, (2, 9)))
    assert torch.equal(plain, ours)
    twice = "base_model.model.classifier.modules_to_save.bias"
    rewrite(tmp_path / "a", lambda w: WRONG["missing"](w, twice), "adapter_model.safetensors")
    load_model(CLASSES, str(tmp_path / "a"))
    rewrite(
        tmp_path / "a",
        lambda w: WRONG["missing"](w, next(k for k in w if "query.base_layer.bias" in k)),
        "adapter_model.safetensors",
    )
    with pytest.raises(ModelError, match=r"file lacks 1 of the weights .*query\.base_layer\.bias"):
        load_model(CLASSES, str(tmp_path / "a"))


@pytest.mark.parametrize("kind", PROMPTS)
def test_tokens_before_a_row_are_refused_where_they_move_its_positions(
    tmp_path, bert, bert_tokenizer, llama, lm_tokenizer, save_teacher, kind
):
    """Virtual tokens change a decoder's logits in padded batches, but not an encoder's."""
    decoder = save_teacher(tiny_model("llama", len(lm_tokenizer), num_labels=2), lm_tokenizer, "decoder")
    for task, base, tokenizer in (
        (TOKENS, llama, lm_tokenizer),
        (CLASSES, decoder, lm_tokenizer),
        (CLASSES, bert, bert_tokenizer),
    ):
        path = tmp_path / f"{base.name}-{kind}"
        settings = ADAPTERS[kind](task_type=TYPES[task.name])
        adapter_of(path, load_model(task, str(base)).model, tokenizer, settings)
        if base is not bert:
            with pytest.raises(ModelError, match="puts 3 tokens before each row"):
                load_model(task, str(path))
    plain, ours = plain_and_ours(CLASSES, bert, path, torch.randint(5, 100, (2, 9)))
    assert torch.equal(plain, ours)
    model, rows = load_model(CLASSES, str(path)).model, [torch.randint(5, 100, (n,)).numpy() for n in (9, 4)]
    examples = [TokenizedExample(i, 0, ids, None, None) for i, ids in enumerate(rows)]
    with torch.inference_mode():
        together = CLASSES.gather_logits(model, *CLASSES.collate(examples, 0))
        alone = torch.cat([model(input_ids=torch.from_numpy(ids)[None]).logits for ids in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_that_cannot_be_read_is_one_line(llama):
    """The tokenizers library raises a bare `Exception`, which becomes a one-line `ModelError`."""
    content = json.loads((llama / "tokenizer.json").read_text())
    (llama / "tokenizer.json").write_text(json.dumps({**content, "model": {**content["model"], "vocab": {"a": 0}}}))
    with pytest.raises(ModelError, match="cannot be loaded by AutoTokenizer") as caught:
        load_model(TOKENS, str(llama))
    assert "\n" not in str(caught.value)


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
    assert detect_task("~/a", base_model="~/llama") is TOKENS  # no task_type: taken from the base


def test_a_classifier_for_another_task_is_named(tmp_path, bert_tokenizer, save_teacher):
    path = save_teacher(tiny_model("bert", len(bert_tokenizer), num_labels=2), bert_tokenizer)
    with pytest.raises(ModelError, match=r"it is a BertForSequenceClassification: give the --task that this is for$"):
        load_model(get_task("masked-lm"), str(path))
