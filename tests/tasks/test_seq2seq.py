"""Rows with sources and targets.

They are truncated and collated separately, and their logits equal the model's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, set_seed

from pipeline.errors import MisuseError
from pipeline.records import BadRow, Columns, Example, Tokenization, TokenizedExample
from pipeline.tasks import get_task
from pipeline.tasks.token_heads import decoder_inputs, supervised_hidden

TASK = get_task("seq2seq-lm")
PAIRS = Columns(text=None, prompt="a", completion="b")


def rows_of(pairs: list[tuple[str, str]], tokenizer: Any, longest: int = 64) -> list[TokenizedExample | BadRow]:
    examples = [Example(i, prompt_completion=pair) for i, pair in enumerate(pairs)]
    return list(TASK.tokenize(examples, "train", tokenizer, Tokenization(longest)))


def test_a_row_has_the_source_and_behind_it_the_target(bert_tokenizer):
    pairs = [("the cat sat", "a dog"), ("a bird", "the cat sat on the dog")]
    for row, (source, target) in zip(rows_of(pairs, bert_tokenizer), pairs, strict=True):
        assert isinstance(row, TokenizedExample)
        assert row.supervised is not None
        assert row.labels is not None
        assert row.input_ids[~row.supervised].tolist() == bert_tokenizer(source)["input_ids"]
        assert row.input_ids[row.supervised].tolist() == row.labels.tolist() == bert_tokenizer(target)["input_ids"]


@pytest.mark.parametrize(
    ("source", "target", "kept"), [(40, 4, (14, 6)), (4, 40, (6, 14)), (40, 40, (10, 10)), (2, 2, (4, 4))]
)
def test_what_is_too_long_is_cut_and_keeps_its_last_token(bert_tokenizer, source, target, kept):
    (row,) = rows_of([("cat " * source, "dog " * target)], bert_tokenizer, longest=20)
    assert isinstance(row, TokenizedExample)
    assert row.supervised is not None
    found = [row.input_ids[flags] for flags in (~row.supervised, row.supervised)]
    assert tuple(map(len, found)) == kept
    assert all(part[-1] == bert_tokenizer.sep_token_id for part in found)
    lost = source + target + 4 - sum(kept)
    assert sum(cut.tokens for cut in row.cut) == lost


def test_columns_that_are_refused():
    for columns in (Columns(), Columns(text=None, messages="chat"), Columns(text=None, input_ids="ids")):
        with pytest.raises(
            MisuseError, match="--task seq2seq-lm reads --prompt-column, the source text, and --completion-column"
        ):
            TASK.check_columns(columns, Tokenization(8))
    with pytest.raises(MisuseError, match="--packing is for language models"):
        TASK.check_columns(PAIRS, Tokenization(8, packing=True))
    with pytest.raises(MisuseError, match="reads plain texts, and the prompts of this data set are chats"):
        TASK.settle(Tokenization(8), None, chats=True)  # type: ignore[arg-type]


SMALL = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
         "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
FAMILIES = {
    "t5": T5,
    "mt5": T5,
    "t5-untied": {**T5, "tie_word_embeddings": False},
    "bart": {**SMALL, "decoder_start_token_id": 2},
    "mbart": SMALL,
    "marian": {**SMALL, "decoder_start_token_id": 1},
    "pegasus": {**SMALL, "decoder_start_token_id": 1},
}


def model_of(kind: str) -> Any:
    set_seed(0)
    config = AutoConfig.for_model(kind.partition("-")[0], vocab_size=60, **FAMILIES[kind])
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3  # so that the logits differ
    return model


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rng = np.random.default_rng(0)
    rows = []
    for source, target in ((7, 3), (4, 6), (9, 1)):
        ids = rng.integers(5, 60, source + target).astype(np.int32)
        rows.append(TokenizedExample(0, 0, ids, np.arange(source + target) >= source, labels=ids[source:]))
    inputs, supervised = TASK.collate(rows, 1)
    assert supervised is not None
    assert inputs["input_ids"].shape == (3, 9)
    assert inputs["labels"].shape == supervised.shape == (3, 6)
    assert (inputs["labels"] != -100).eq(supervised).all()
    return inputs, supervised


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_at_target_tokens_are_the_models_under_teacher_forcing(kind):
    """The reference is `model(labels=...)`, which shifts the targets to the right itself.

    A single row gives the same logits.
    """
    model, (inputs, supervised) = model_of(kind), batch()
    with torch.no_grad():
        plain = model(**inputs)
        found = TASK.gather_logits(model, inputs, supervised)
        torch.testing.assert_close(found, plain.logits[supervised], atol=1e-5, rtol=1e-5)
        alone = model(
            input_ids=inputs["input_ids"][1:2, :4],
            attention_mask=inputs["attention_mask"][1:2, :4],
            labels=inputs["labels"][1:2, :6],
        ).logits[0]
        torch.testing.assert_close(found[3:9], alone, atol=1e-4, rtol=1e-4)
    loss = torch.nn.functional.cross_entropy(found, inputs["labels"][supervised])
    torch.testing.assert_close(loss, plain.loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_hidden_states_are_what_the_output_matrix_reads(kind):
    model, (inputs, supervised) = model_of(kind), batch()
    hidden = supervised_hidden(model, decoder_inputs(model, inputs), supervised)
    assert hidden.requires_grad
    logits = model.get_output_embeddings()(hidden)
    torch.testing.assert_close(logits, TASK.gather_logits(model, inputs, supervised), atol=1e-5, rtol=1e-5)
