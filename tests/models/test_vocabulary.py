"""Models with a new vocabulary: sizes and ids in the configuration, rows of embedding and head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from pipeline.errors import ModelError
from pipeline.models.vocabulary import NewVocabulary, check_shapes, rows_of_vocabulary, with_vocabulary
from pipeline.records import Ragged
from tests.conftest import tiny_model


def vocabulary(tokenizer, *sources: list[int]) -> NewVocabulary:
    """A new vocabulary with sources for its first tokens and no counterparts of special tokens."""
    values = np.array([i for found in sources for i in found], dtype=np.int64)
    return NewVocabulary(tokenizer, lambda _: None, Ragged.of(values, np.array([len(found) for found in sources])))


def test_rows_are_means_of_their_sources_or_of_all(lm_tokenizer):
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", vocab_size=40, **sizes))
    torch.nn.init.normal_(teacher.lm_head.bias)
    own = vocabulary(lm_tokenizer, [7], [1, 3, 3], [], [39, 40])  # the model has no row 40
    found = rows_of_vocabulary(teacher, own, with_vocabulary(teacher.config, own))
    assert set(found) == {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"}
    for name, rows in found.items():
        old = teacher.state_dict()[name]
        assert rows.shape == (len(lm_tokenizer), *old.shape[1:])
        expected = [old[7], old[[1, 3, 3]].mean(0), old.mean(0), old[39], old.mean(0)]
        for row, wanted in zip(rows, expected, strict=False):
            torch.testing.assert_close(row, wanted)
    assert (own.num_copied, own.num_averaged, own.num_unknown) == (0, 3, len(lm_tokenizer) - 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_have_the_dtype_of_the_teacher(lm_tokenizer, dtype):
    teacher = tiny_model("llama", 40).to(dtype)
    own = vocabulary(lm_tokenizer, [7])
    found = rows_of_vocabulary(teacher, own, with_vocabulary(teacher.config, own))
    assert {rows.dtype for rows in found.values()} == {dtype}
    assert torch.equal(found["lm_head.weight"][0], teacher.lm_head.weight[7])


def test_positions_after_the_padding_move_with_it(bert_tokenizer):
    teacher = tiny_model("roberta", 150, num_labels=2)
    own = NewVocabulary(bert_tokenizer, {0: 3}.get, Ragged.of(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)))
    config = with_vocabulary(teacher.config, own)
    assert (teacher.config.pad_token_id, config.pad_token_id) == (0, 3)
    found = rows_of_vocabulary(teacher, own, config)["roberta.embeddings.position_embeddings.weight"]
    old = teacher.roberta.embeddings.position_embeddings.weight
    assert torch.equal(found[4:], old[1:-3])  # RoBERTa's positions begin after the padding id


def test_sizes_and_ids_of_a_configuration_inside_another(lm_tokenizer):
    config = AutoConfig.for_model("gemma3", text_config={"vocab_size": 500, "eos_token_id": [5, 6], "pad_token_id": 0})
    own = NewVocabulary(lm_tokenizer, {5: 9, 6: 9}.get)
    text = with_vocabulary(config, own).get_text_config()
    assert (text.vocab_size, text.eos_token_id, text.pad_token_id) == (len(lm_tokenizer), [9], 0)
    assert config.get_text_config().vocab_size == 500


def test_other_weights_of_the_vocabularys_size_are_refused(lm_tokenizer):
    student = tiny_model("llama", 40)
    weights = {**student.state_dict(), "model.norm.weight": torch.zeros(40)}
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: model\.norm\.weight depends on the vocabulary"):
        check_shapes(student, weights)
    check_shapes(student, student.state_dict())
