"""A GGUF file loads as the model that it was written from, or is refused if weights are missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import ModelError
from pipeline.models import load_model
from pipeline.tasks import get_task
from tests.conftest import tiny_model

gguf = pytest.importorskip("gguf")
TOKENS = get_task("causal-lm")
#: GGUF name -> transformers name of the modules in a Llama block.
BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@pytest.fixture(scope="module")
def model(lm_tokenizer):
    return tiny_model("llama", len(lm_tokenizer), num_hidden_layers=2, spread=2.0)


@pytest.fixture(scope="module")
def tensors(model) -> dict[str, np.ndarray]:
    """The weights of a tiny Llama, named and permuted as by llama.cpp's converter."""
    found = {"token_embd.weight": "model.embed_tokens", "output_norm.weight": "model.norm", "output.weight": "lm_head"}
    for layer in range(model.config.num_hidden_layers):
        for name, module in BLOCK.items():
            found[f"blk.{layer}.{name}.weight"] = f"model.layers.{layer}.{module}"
    state = {name: model.state_dict()[f"{module}.weight"].numpy() for name, module in found.items()}
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for name in state:
        count = next((n for part, n in heads.items() if f".{part}." in name), None)
        if count is not None:  # (heads, 2, half, width) -> (heads, half, 2, width)
            rows, width = state[name].shape
            turned = state[name].reshape(count, 2, rows // count // 2, width).swapaxes(1, 2)
            state[name] = np.ascontiguousarray(turned.reshape(rows, width))
    return state


def written(path: Path, tensors: dict[str, np.ndarray], config, layers: int, tokenizer) -> Path:
    """Write a GGUF file that includes the tokenizer."""
    writer = gguf.GGUFWriter(path / "model.gguf", "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces)
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges([" ".join(pair) for pair in rules["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path / "model.gguf"


def test_a_whole_file_is_the_model(tmp_path, model, tensors, lm_tokenizer):
    path = written(tmp_path, tensors, model.config, 2, lm_tokenizer)
    found = load_model(TOKENS, str(path), dtype="float32").model
    ids = torch.randint(2, 300, (2, 9))
    with torch.inference_mode():
        torch.testing.assert_close(found(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if "blk.1.attn_v" not in k},
            r"lacks 1 weights.*layers\.1\.self_attn\.v_proj",
        ),
        (lambda t: {k.replace("blk.0.ffn_up", "blk.0.ffn_upper"): v for k, v in t.items()}, "lacks 1 weights"),
        (
            lambda t: {**t, **{k.replace("blk.1", "blk.2"): v for k, v in t.items() if "blk.1" in k}},
            "has no place for",
        ),
    ],
)
def test_a_file_with_other_tensors_is_refused(tmp_path, model, tensors, lm_tokenizer, change, message):
    path = written(tmp_path, change(tensors), model.config, 2, lm_tokenizer)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(TOKENS, str(path), dtype="float32")
    assert "\n" not in str(caught.value)
