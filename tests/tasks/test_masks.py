"""Masks depend only on seed and position, with BERT's shares.

The logits at masked tokens equal the model's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoConfig, AutoModelForMaskedLM, set_seed

from pipeline.errors import MisuseError
from pipeline.records import BadRow, Columns, Example, Masking, Tokenization, TokenizedExample
from pipeline.tasks import check_columns, get_task
from pipeline.tasks.masks import draw_mask
from tests.conftest import WORDS

TASK = get_task("masked-lm")
ALLOWED = np.arange(5, 1000)


def drawn(
    seed: int, row: int, *, share: float = 0.15, count: int = 100, words: Any = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.random.default_rng(row).integers(5, 1000, count).astype(np.int32)
    masking = Masking(share=share, whole_words=words is not None, seed=seed)
    hidden, shown = draw_mask(ids, masking, mask_id=4, allowed=ALLOWED, words=words, place=("train", row, 0))
    return ids, hidden, shown


def test_shares_are_those_of_bert():
    """Of the 15% selected tokens, 80% are masked, 10% are random and 10% stay unchanged.

    Every position is selected equally often.
    """
    kinds, places = np.zeros(3, dtype=int), np.zeros(100, dtype=int)
    replacements = []
    for row in range(2000):
        ids, hidden, shown = drawn(0, row)
        assert hidden.sum() == 15
        assert (shown[~hidden] == ids[~hidden]).all()
        same, masked = shown[hidden] == ids[hidden], shown[hidden] == 4
        kinds += [masked.sum(), (~masked & ~same).sum(), same.sum()]
        places += hidden
        replacements += shown[hidden][~masked & ~same].tolist()
    total = kinds.sum()
    expected = np.array([0.8, 0.1 * (1 - 1 / 995), 0.1 + 0.1 / 995]) * total
    assert stats.chisquare(kinds, expected).pvalue > 1e-3
    assert stats.chisquare(places).pvalue > 1e-3
    counts = np.bincount(np.digitize(replacements, np.linspace(5, 1000, 11)) - 1, minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_mask_is_a_matter_of_seed_and_place():
    first, again, other = drawn(0, 1), drawn(0, 1), drawn(1, 1)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[1] != other[1]).any()


@pytest.mark.parametrize(("count", "share", "expected"), [(1, 0.15, 1), (3, 0.15, 1), (10, 0.5, 5), (100, 0.3, 30)])
def test_a_row_hides_at_least_one_token(count, share, expected):
    assert drawn(0, 3, share=share, count=count)[1].sum() == expected


def test_whole_words_are_hidden_or_none_of_a_word():
    words = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 5, 40)).tolist()
    for row in range(50):
        _, hidden, _ = drawn(0, row, count=len(words), words=words)
        by_word = [hidden[np.array(words) == word] for word in range(40)]
        assert all(each.all() or not each.any() for each in by_word)
        assert 1 <= hidden.sum() <= round(0.15 * len(words))


def test_a_single_long_word_is_hidden_whole():
    _, hidden, _ = drawn(0, 0, count=5, words=[0] * 5)
    assert hidden.all()


def rows_of(text: str, tokenizer: Any, **masking: Any) -> list[TokenizedExample | BadRow]:
    settings = Tokenization(max_length=8, masking=Masking(**masking))
    return list(TASK.tokenize([Example(7, text=text)], "train", tokenizer, settings, texts=True))


def test_texts_are_divided_and_each_piece_has_its_masks(bert_tokenizer):
    text = " ".join((WORDS * 3)[:20])
    rows = rows_of(text, bert_tokenizer, copies=2)
    ids = bert_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [row.piece for row in rows if isinstance(row, TokenizedExample)] == list(range(2 * -(-len(ids) // 6)))
    restored = []
    for row in rows:
        assert isinstance(row, TokenizedExample)
        assert row.supervised is not None
        assert row.input_ids[0] == bert_tokenizer.cls_token_id
        assert row.input_ids[-1] == bert_tokenizer.sep_token_id
        assert not row.supervised[[0, -1]].any()
        assert row.num_positions == 1
        tokens = row.input_ids.copy()
        tokens[row.supervised] = row.labels
        restored.append(tokens[1:-1].tolist())
        assert bert_tokenizer(row.text, add_special_tokens=False)["input_ids"] == restored[-1]
    assert [i for part in restored[::2] for i in part] == ids
    assert restored[::2] == restored[1::2]
    assert any((a.supervised != b.supervised).any() for a, b in zip(rows[::2], rows[1::2], strict=True))


def test_a_text_without_a_token_to_hide_is_a_bad_row(bert_tokenizer):
    for text in (" ", "[SEP] [CLS]"):
        (row,) = rows_of(text, bert_tokenizer)
        assert isinstance(row, BadRow)
        assert row.reason == "expected a token to hide, found none"


def test_settings_of_masks_are_for_this_task(bert_tokenizer, lm_tokenizer):
    masked = Tokenization(max_length=8, masking=Masking())
    with pytest.raises(
        MisuseError, match=r"--mask-share, .* are for masked language models; --task causal-lm hides nothing"
    ):
        check_columns(get_task("causal-lm"), Columns(), masked)
    for columns in (Columns(text_pair="other"), Columns(text=None, messages="chat")):
        with pytest.raises(MisuseError, match="--task masked-lm reads --text-column"):
            check_columns(TASK, columns, masked)
    with pytest.raises(MisuseError, match="--packing is for language models"):
        check_columns(TASK, Columns(), Tokenization(max_length=8, packing=True))
    with pytest.raises(MisuseError, match="has no mask token"):
        TASK.settle(masked, lm_tokenizer, chats=False)
    assert TASK.settle(Tokenization(max_length=8), bert_tokenizer, chats=False).masking == Masking()
    with pytest.raises(MisuseError, match="--max-length 2: expected more than the tokenizer's special tokens"):
        list(TASK.tokenize([], "train", bert_tokenizer, Tokenization(max_length=2)))


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "pad_token_id": 0,
}
FAMILIES = {
    "bert": SMALL,
    "roberta": {**SMALL, "max_position_embeddings": 40},
    "xlm-roberta": {**SMALL, "max_position_embeddings": 40},
    "camembert": {**SMALL, "max_position_embeddings": 40},
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
    "albert": {**SMALL, "embedding_size": 8, "num_hidden_groups": 1},
    "electra": {**SMALL, "embedding_size": 8},
    "deberta-v2": {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    "modernbert": {**SMALL, "bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0},
    "mpnet": {**SMALL, "max_position_embeddings": 40},
    "eurobert": {**SMALL, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "mask_token_id": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_at_hidden_tokens_are_the_models(kind):
    set_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=60, **FAMILIES[kind])
    model = AutoModelForMaskedLM.from_config(config).eval()
    rows = [
        TokenizedExample(
            0,
            0,
            np.arange(5, 5 + length, dtype=np.int32),
            np.arange(length) % 3 == 1,
            labels=np.zeros(0, dtype=np.int32),
        )
        for length in (9, 5, 7)
    ]
    inputs, supervised = TASK.collate(rows, 0)
    with torch.no_grad():
        plain = TASK.at_positions(model(**inputs).logits, supervised)
        found = TASK.gather_logits(model, inputs, supervised)
    assert found.shape == (sum(int(row.supervised.sum()) for row in rows if row.supervised is not None), 60)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
