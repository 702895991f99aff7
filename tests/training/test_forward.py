"""The loss computed inside the student's forward.

The fused and the dense path agree with every wrapper that users of Trainer apply to a model.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import types

import pytest
import torch

import pipeline as softlabel
from pipeline.cache import Cache
from pipeline.errors import TrainingError
from pipeline.models.arguments import training_arguments
from pipeline.records import Full, Loss, Sampled, TopK
from pipeline.tasks import get_task
from pipeline.training import DistillationTrainer, distillation_loss
from pipeline.training.batches.collate import Collator, TrainingRows, from_tensors, to_tensors
from pipeline.training.forward import GIVEN, attach_loss, detach_loss
from tests.conftest import tiny_model
from tests.support.rows import build_cache
from tests.support.spans import pairs

TASK = get_task("causal-lm")
LOSS = Loss()
KINDS = ["gpt2", "llama", "qwen3", "gemma2", "cohere", "opt", "gpt_neox", "mixtral"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory, lm_tokenizer) -> Cache:
    return build_cache(
        tmp_path_factory.mktemp("forward"), lm_tokenizer, encoding=Sampled(6.0), classes=320, per_shard=12, shards=1
    )


def batch_of(cache: Cache, count: int = 6, **settings):
    picked = TrainingRows(cache.dataset("train")).__getitems__(list(range(count)))
    return Collator(TASK, cache.tokenizer, 1.0, **settings)(picked)


def losses(model, tensors, loss: Loss = LOSS, *, attach: bool = True):
    if attach:
        attach_loss(model, task=TASK, num_classes=320, loss=loss, temperature=1.0)
    return model(**tensors["inputs"], distillation={name: tensors[name] for name in GIVEN if name in tensors})


def dense(model, tensors, loss: Loss = LOSS):
    batch = from_tensors(tensors, 320)
    logits = TASK.gather_logits(model, batch.inputs, batch.supervised)
    return distillation_loss(
        logits, batch.target, labels=batch.labels, loss=loss, temperature=1.0, weights=batch.weights
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_loss_is_the_dense_one_of_the_models_own_logits(cache, lm_tokenizer, kind):
    model = tiny_model(kind, len(lm_tokenizer), spread=3.0)
    exact = kind != "mixtral"  # its experts compute in float32 at most
    model = model.double() if exact else model
    tensors = batch_of(cache)
    expected = dense(model, tensors)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected.total, parameters, allow_unused=True)
    assert attach_loss(model, task=TASK, num_classes=320, loss=Loss(), temperature=1.0)
    found = losses(model, tensors, attach=False)
    torch.testing.assert_close(found["total"], expected.total, rtol=1e-6, atol=1e-8)
    for a, b in zip(torch.autograd.grad(found["total"], parameters, allow_unused=True), wanted, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5 if exact else 1e-3, atol=1e-8 if exact else 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_matrices(cache, lm_tokenizer, tied):
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0, tie_word_embeddings=tied).double()
    tensors = batch_of(cache)
    expected = torch.autograd.grad(dense(model, tensors).total, model.get_input_embeddings().weight)[0]
    found = torch.autograd.grad(losses(model, tensors)["total"], model.get_input_embeddings().weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_model_whose_logits_are_made_otherwise_takes_the_dense_path(cache, lm_tokenizer, caplog):
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0)

    class Shifted(torch.nn.Linear):
        pass

    plain = model.lm_head
    model.lm_head = Shifted(plain.in_features, plain.out_features, bias=False)
    tensors = batch_of(cache)
    with caplog.at_level(logging.WARNING):
        assert not attach_loss(model, task=TASK, num_classes=320, loss=Loss(), temperature=1.0)
    assert "is a Shifted, not a plain linear layer; the loss is taken over dense logits" in caplog.text
    torch.testing.assert_close(losses(model, tensors, attach=False)["total"], dense(model, tensors).total)


def test_without_a_distillation_the_model_is_as_it_was(lm_tokenizer):
    model = tiny_model("llama", len(lm_tokenizer))
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    attach_loss(model, task=TASK, num_classes=320, loss=Loss(), temperature=1.0)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: torch.optim.swa_utils.AveragedModel(model).module])
def test_a_copy_runs_on_its_own_weights(cache, lm_tokenizer, copied):
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0)
    attach_loss(model, task=TASK, num_classes=320, loss=Loss(), temperature=1.0)
    other = copied(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    ids, tensors = torch.tensor([[5, 6, 7]]), batch_of(cache)
    assert not other(input_ids=ids).logits.any()
    assert model(input_ids=ids).logits.any()
    assert not torch.equal(losses(other, tensors, attach=False)["total"], losses(model, tensors, attach=False)["total"])


@pytest.mark.parametrize("own", [False, True])
def test_nothing_stays_on_the_instance_once_the_loss_is_detached(lm_tokenizer, own):
    """A `forward` set on the instance is restored, also with accelerate's mixed precision."""
    model = tiny_model("llama", len(lm_tokenizer))
    mine = types.MethodType(lambda self, *args, **inputs: "mine", model)
    if own:
        model.forward = mine
    attach_loss(model, task=TASK, num_classes=320, loss=Loss(), temperature=1.0)
    model._original_forward = model.forward  # as Accelerator.prepare_model does under bf16
    model.forward = types.MethodType(torch.autocast("cpu", torch.bfloat16)(model.forward.__func__), model)
    detach_loss(model)
    assert "_original_forward" not in model.__dict__
    assert model.__dict__.get("forward") == (mine if own else None)
    detach_loss(model)  # a second call has no effect
    assert ("forward" in model.__dict__) == own


def test_evaluation_says_what_each_position_predicts(cache, lm_tokenizer):
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0)
    tensors = batch_of(cache)
    batch = from_tensors(tensors, 320)
    logits = TASK.gather_logits(model, batch.inputs, batch.supervised)
    found = losses(model, tensors)
    assert torch.equal(found["predicted"], logits.argmax(-1))
    nll = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    torch.testing.assert_close(found["nll"], nll)
    model.train()
    assert "predicted" not in losses(model, tensors, attach=False)


def test_gradient_checkpointing(cache, lm_tokenizer):
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0).train()
    tensors = batch_of(cache)
    attach_loss(model, task=TASK, num_classes=320, loss=Loss(), temperature=1.0)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(losses(model, tensors, attach=False)["total"], model.get_input_embeddings().weight)[
            0
        ]

    expected = gradient()
    model.activation_checkpointing_enable()
    torch.testing.assert_close(gradient(), expected)


def test_bfloat16_activations_are_bfloat16(cache, lm_tokenizer):
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0)
    tensors = batch_of(cache)
    attach_loss(model, task=TASK, num_classes=320, loss=Loss(), temperature=1.0)
    exact = losses(model, tensors, attach=False)["total"]
    seen = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses(model, tensors, attach=False)["total"]
    hook.remove()
    assert set(seen) == {torch.bfloat16}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.02)
    assert not torch.equal(found, exact)


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_lora_around_the_layers_is_fused_and_on_the_head_dense(cache, lm_tokenizer, target):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model("llama", len(lm_tokenizer), spread=3.0),
        LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    tensors = batch_of(cache)
    expected = dense(model, tensors)
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected.total, trained)
    fused = attach_loss(model, task=TASK, num_classes=320, loss=Loss(), temperature=1.0)
    assert fused == (target == "q_proj")
    found = losses(model, tensors, attach=False)["total"]
    torch.testing.assert_close(found, expected.total)
    for a, b in zip(torch.autograd.grad(found, trained), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # of torch's compiler
def test_a_compiled_student_trains_on_the_right_positions(cache, lm_tokenizer):
    """Consecutive batches have different shapes and supervised positions."""
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0, num_hidden_layers=1)
    batches = [batch_of(cache, count) for count in (2, 5, 3)]
    expected = [dense(model, tensors).total.detach() for tensors in batches]
    attach_loss(model, task=TASK, num_classes=320, loss=Loss(), temperature=1.0)
    compiled = torch.compile(model.train(), backend="aot_eager")
    for tensors, value in zip(batches, expected, strict=True):
        found = losses(compiled, tensors, attach=False)["total"]
        found.backward()
        torch.testing.assert_close(found.detach(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encoding", [Full(), TopK(4, (1.0, 2.0)), Sampled(6.0)])
def test_a_trainers_steps_are_those_of_the_dense_loss(tmp_path, lm_tokenizer, encoding, monkeypatch):
    cache = build_cache(tmp_path / "cache", lm_tokenizer, encoding=encoding, per_shard=12, shards=2)

    def weights(fused: bool) -> torch.Tensor:
        model = tiny_model("llama", len(lm_tokenizer), spread=2.0)
        if not fused:
            monkeypatch.setattr("pipeline.training.forward._read_transform", lambda model: (None, "asked to be dense"))
        args = training_arguments(
            str(tmp_path / "o"), {}, max_steps=4, per_device_train_batch_size=4, save_strategy="no"
        )
        DistillationTrainer(model, args, cache=cache, loss=softlabel.Loss(0.5, 0.5)).train()
        return model.lm_head.weight.detach()

    torch.testing.assert_close(weights(True), weights(False), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_aligned_spans_in_the_fused_loss_are_those_of_dense_logits(cache, lm_tokenizer, kind, checkpointing):
    """Uses a plain head, one with a cap and one with a scale, some with tied matrices."""
    model = tiny_model(kind, len(lm_tokenizer), spread=3.0).double().train()
    batch = from_tensors(batch_of(cache), 320)
    batch = dataclasses.replace(batch, spans=pairs(batch))
    tensors, loss = to_tensors(batch), Loss(0.2, 0.3, span_weight=0.5, span_temperature=3.0)
    logits = TASK.gather_logits(model, batch.inputs, batch.supervised)
    settings = {"labels": batch.labels, "loss": loss, "temperature": 1.0, "weights": batch.weights}
    expected = distillation_loss(logits, batch.target, spans=batch.spans, **settings)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected.total, parameters, allow_unused=True)
    if checkpointing:
        model.activation_checkpointing_enable()
    found = losses(model, tensors, loss)
    assert float(expected.span_sum) > 1
    torch.testing.assert_close(found["span_sum"], expected.span_sum, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found["total"], expected.total, rtol=1e-6, atol=1e-8)
    for a, b in zip(torch.autograd.grad(found["total"], parameters, allow_unused=True), wanted, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_a_span_weight_without_spans_is_refused(cache, lm_tokenizer):
    with pytest.raises(TrainingError, match=r"--span-weight 0.5: expected aligned spans with the batch, found none"):
        losses(tiny_model("llama", len(lm_tokenizer)), batch_of(cache), Loss(span_weight=0.5))
