"""The head during training: it yields the same scores, and its saved weights load anywhere."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

from pipeline.records import Scale
from pipeline.training.scores import standardized

SCALE = Scale(np.array([150.0, 0.02], dtype=np.float32), np.array([50.0, 0.01], dtype=np.float32))
SHAPES = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "roberta": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "pad_token_id": 0},
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
    "modernbert": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0,
    },
    "llama": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "pad_token_id": 0},
}  # fmt: skip


def model_of(kind: str, **settings):
    set_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=30, num_labels=2, problem_type="regression", **SHAPES[kind])
    return AutoModelForSequenceClassification.from_config(config).eval()


def scores_of(model) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]


def trained(model):
    """Set the bias, if there is one, to values other than 0."""
    for name, parameter in model.named_parameters():
        if name.endswith(("classifier.bias", "out_proj.bias")):
            parameter.data += 3.0
    return model


@pytest.mark.parametrize("kind", SHAPES)
def test_a_trained_model_gives_the_same_scores_within_and_after(kind, tmp_path):
    model = trained(model_of(kind))
    before, state = scores_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    with standardized(model, SCALE):
        torch.testing.assert_close(scores_of(model), before, atol=1e-3, rtol=1e-4)
        model.save_pretrained(tmp_path)  # a checkpoint
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, state[name], atol=1e-4, rtol=1e-4)
        model.load_state_dict(state)
        torch.testing.assert_close(scores_of(model), before, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(scores_of(model), before, atol=1e-3, rtol=1e-4)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(scores_of(loaded), before, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_new_head_begins_near_the_mean_and_learns_at_the_unit(kind):
    """One step of Adam changes scores by about the learning rate in standard deviations."""
    model = model_of(kind)
    moved = []
    with standardized(model, SCALE):
        before = scores_of(model)
        torch.testing.assert_close(before, torch.from_numpy(SCALE.mean), atol=20.0, rtol=0.5)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        ids = torch.tensor([[5, 6, 7, 8]])
        (
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits / torch.from_numpy(SCALE.std)
        ).sum().backward()
        optimizer.step()
        moved = ((before - scores_of(model)) / torch.from_numpy(SCALE.std)).tolist()
    assert all(1e-3 <= each < 0.5 for each in moved)
    torch.testing.assert_close(
        scores_of(model), before - torch.tensor(moved) * torch.from_numpy(SCALE.std), rtol=1e-3, atol=1e-3
    )


def test_a_layer_without_a_bias_keeps_no_mean():
    model = model_of("llama")
    with standardized(model, SCALE):
        assert abs(float(scores_of(model)[0])) < 100  # not 150


def test_half_precision_does_not_round_the_mean_away():
    model = model_of("bert")
    with standardized(model, SCALE), torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scores_of(model)
    assert scores.dtype == torch.float32
    with standardized(model, SCALE):
        torch.testing.assert_close(scores, scores_of(model), atol=0.02 * 50, rtol=0)


def test_a_model_whose_scores_come_from_elsewhere_is_trained_as_it_is(caplog):
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"logits": input_ids.float().mean(-1, keepdim=True) * self.weight})

    with caplog.at_level(logging.WARNING), standardized(Odd(), SCALE):
        pass
    assert (
        "found no linear layer that gives its scores: it is trained in the unit of the data (mean 150, 0.02, standard deviation 50, 0.01)"
        in caplog.text
    )


def test_nothing_is_done_for_distributions():
    model = model_of("bert")
    with standardized(model, None):
        assert not model.classifier._forward_hooks
