"""Scores of labels after prompts.

They equal those of one forward pass for each prompt and label, whatever the scorer shares.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from pipeline.capture.teachers.judge.local import LocalScorer
from pipeline.errors import ModelError
from pipeline.models import LoadedModel
from tests.conftest import TINY, tiny_model

#: Labels of one token, labels with common first tokens, and a label that is a prefix of another.
LABELS = ((7,), (8, 9, 10), (8, 9, 11), (8, 12), (9,), (9, 4, 4, 5))
KINDS = ("llama", "gpt2", "qwen3", "cohere", "opt", "gpt_neox")


#: Models that compute positions themselves, from the input or the attention mask; that attend
#: within chunks; or that have layers without attention keys.
OTHERS = {
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},
    "falcon": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "alibi": True},
    "llama4_text": {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
        **{"num_key_value_heads": 2, "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 16},
    },
    "lfm2": {
        **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    },
}


def prompts_of(rng, sizes, prefix):
    return [np.concatenate([prefix, rng.integers(5, 300, size)]) for size in sizes]


def reference(model, prompt, label):
    """Log p(label | prompt) from one pass over the whole sequence, without padding or KV cache."""
    ids = torch.tensor([[*prompt.tolist(), *label]])
    logprobs = torch.log_softmax(model(input_ids=ids).logits[0], -1)
    at = range(len(prompt) - 1, len(prompt) - 1 + len(label))
    return float(sum(logprobs[i, token] for i, token in zip(at, label, strict=True)))


def scorer_of(model, tokenizer, batch_tokens=8192):
    return LocalScorer(LoadedModel(model, tokenizer, "tiny"), batch_tokens)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float64) for kind in KINDS),
        *((kind, torch.float32) for kind in ("llama", "gemma2", "mixtral", *OTHERS)),
    ],
)
def test_scores_are_those_of_one_pass_for_each(kind, dtype, lm_tokenizer, monkeypatch):
    for other, settings in OTHERS.items():
        monkeypatch.setitem(TINY, other, settings)
    overrides = {"sliding_window": 8} if kind == "gemma2" else {}
    model = tiny_model(kind, len(lm_tokenizer), spread=3.0, **overrides).to(dtype)
    rng = np.random.default_rng(0)
    prefix = rng.integers(5, 300, 11)
    prompts = prompts_of(rng, (1, 3, 17, 4, 9, 2), prefix)
    prompts[3] = rng.integers(5, 300, 20)  # without the prefix
    scorer = scorer_of(model, lm_tokenizer)
    found = scorer.begin(prompts, LABELS, prefix).result()
    with torch.inference_mode():
        expected = torch.tensor(
            [[reference(model, prompt, label) for label in LABELS] for prompt in prompts], dtype=torch.float64
        )
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    np.testing.assert_allclose(found.double(), expected, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(scorer.plain(prompts, LABELS).double(), expected, atol=tolerance, rtol=tolerance)
    scorer.compare(prompts[:2], LABELS, prefix)


@pytest.mark.parametrize("batch_tokens", [1, 64, 90])
def test_batches_and_prefix_change_nothing(batch_tokens, lm_tokenizer):
    model = tiny_model("llama", len(lm_tokenizer), spread=3.0).double()
    rng = np.random.default_rng(1)
    prefix = rng.integers(5, 300, 7)
    prompts = prompts_of(rng, rng.integers(1, 30, 12), prefix)
    whole = scorer_of(model, lm_tokenizer).begin(prompts, LABELS, prefix[:0]).result()
    found = scorer_of(model, lm_tokenizer, batch_tokens).begin(prompts, LABELS, prefix).result()
    np.testing.assert_allclose(found, whole, atol=1e-9)


def test_a_recurrent_model_passes_each_label_with_its_prompt(lm_tokenizer):
    config = AutoConfig.for_model(
        "mamba2",
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=1,
        pad_token_id=0,
    )
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    rng = np.random.default_rng(2)
    prompts = prompts_of(rng, (3, 9), rng.integers(5, 300, 4))
    scorer = scorer_of(model, lm_tokenizer)
    found = scorer.begin(prompts, LABELS, prompts[0][:4]).result()
    with torch.inference_mode():
        expected = torch.tensor([[reference(model, prompt, label) for label in LABELS] for prompt in prompts])
    np.testing.assert_allclose(found, expected, atol=1e-3)


def passes_of(scorer, monkeypatch):
    """The shapes of `input_ids` in the scorer's forward passes, appended as they run."""
    seen = []
    inner = LocalScorer._forward

    def counted(self, inputs, **settings):
        seen.append(inputs["input_ids"].shape)
        return inner(self, inputs, **settings)

    monkeypatch.setattr(LocalScorer, "_forward", counted)
    return seen


def test_what_is_shared_is_passed_once(lm_tokenizer, monkeypatch):
    scorer = scorer_of(tiny_model("llama", len(lm_tokenizer)), lm_tokenizer)
    rng = np.random.default_rng(3)
    prefix = rng.integers(5, 300, 40)
    seen = passes_of(scorer, monkeypatch)
    one_token = ((7,), (8,), (9,))
    scorer.begin(prompts_of(rng, (5, 3), prefix), one_token, prefix)
    assert seen == [(1, 40), (2, 5)]  # no pass for labels of one token
    seen.clear()
    scorer.begin(prompts_of(rng, (5, 3, 4), prefix), LABELS, prefix)
    # The prefix is reused. Inner nodes of the label tree: 8, 8 9, 9, 9 4, 9 4 4
    assert seen == [(3, 5), *[(3, 1)] * 5]


def test_a_model_that_reads_its_cache_otherwise_is_refused(lm_tokenizer, monkeypatch):
    scorer = scorer_of(tiny_model("llama", len(lm_tokenizer), spread=3.0), lm_tokenizer)
    rng = np.random.default_rng(4)
    prompts = prompts_of(rng, (5, 3), rng.integers(5, 300, 4))
    inner = LocalScorer._of_tree
    monkeypatch.setattr(LocalScorer, "_of_tree", lambda *arguments: inner(*arguments) + 0.1)
    with pytest.raises(ModelError, match="tiny: log-probabilities of the labels after a shared prompt differ"):
        scorer.compare(prompts, LABELS, prompts[0][:4])


def test_not_finite_is_nan_in_its_row_alone(lm_tokenizer):
    model = tiny_model("llama", len(lm_tokenizer))
    with torch.no_grad():
        model.get_input_embeddings().weight[299] = torch.nan
    prompts = [np.array([5, 6, 7]), np.array([5, 299, 7])]
    found = scorer_of(model, lm_tokenizer).begin(prompts, LABELS, prompts[0][:0]).result()
    assert found[0].isfinite().all()
    assert found[1].isnan().any()
