"""Alignment of random texts for all pairs of tokenizers, compared with the tokenizers' offsets."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from pipeline.cross_tokenizer.rows import CachedTokens, Retokenizer, StudentRow
from pipeline.cross_tokenizer.token_bytes import TokenBytes
from pipeline.cross_tokenizer.vocabulary_map import map_vocabulary
from pipeline.records import Example, Tokenization, TokenizedExample
from pipeline.tasks import get_task
from tests.support.profile import examples
from tests.tasks.families import FAMILIES

BYTES = {name: TokenBytes.of(tokenizer) for name, tokenizer in FAMILIES.items()}
#: Tokenizers that normalise a text, so that it cannot be recovered from the tokens.
CHANGING = {"t5", "deberta", "bert", "qwen"}
PAIRS = [(a, b) for a in FAMILIES for b in FAMILIES]
pieces = st.sampled_from(
    [
        "the cat",
        " sat",
        " on a mat",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "é",
        "e\u0301",
        "😀",
        "👩‍👩‍👧",
        "漢字",
        "٣",
        "10",
        ".",
        "'t",
        "<",
        "x",
        "\u200b",
        "ﬁ",
        "½",
    ]
)
texts = st.lists(pieces, min_size=1, max_size=9).map("".join).filter(lambda text: text.strip() != "")


def retokenizer(teacher: str, student: str, max_length: int = 1 << 20) -> Retokenizer:
    ours, theirs = BYTES[student], BYTES[teacher]
    mapping = map_vocabulary(theirs, ours, len(theirs.pieces), len(ours.pieces))
    return Retokenizer(theirs, ours, mapping.first_token, max_length)


RETOKENIZERS = {pair: retokenizer(*pair) for pair in PAIRS}


def rows_of(family: str, text: str, max_length: int = 512) -> list[TokenizedExample]:
    tokenizer: Any = FAMILIES[family]
    found = get_task("causal-lm").tokenize([Example(0, text=text)], "train", tokenizer, Tokenization(max_length))
    return [row for row in found if isinstance(row, TokenizedExample)]


def cached(row: TokenizedExample, text: str | None = None) -> CachedTokens:
    assert row.supervised is not None
    return CachedTokens(row.input_ids, row.supervised, row.piece > 0, row.text_bytes, text)


def begins(family: str, row: Any, text: str) -> list[int]:
    """The byte at which each predicted token begins, from the tokenizer's offsets."""
    encoded = FAMILIES[family](text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    vocabulary = BYTES[family].vocabulary
    ends = np.cumsum(vocabulary.bytes_of_text(text, np.asarray(ids, dtype=np.int32), offsets))
    starts = {i: int(ends[i - 1]) if i else 0 for i in range(len(ids))}
    before = (
        len(vocabulary.prefix) if tuple(row.input_ids[: len(vocabulary.prefix)].tolist()) == vocabulary.prefix else 0
    )
    assert row.input_ids[before : before + len(ids)].tolist() == ids
    return [starts.get(int(p) + 1 - before, -1) for p in np.flatnonzero(row.supervised)]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@settings(max_examples=examples(6, 60), deadline=None)
@given(text=texts)
def test_aligned_positions_predict_text_from_the_same_byte_on(pair: tuple[str, str], text: str) -> None:
    teacher, student = pair
    for row in rows_of(teacher, text):
        found = RETOKENIZERS[pair].rows([cached(row)])[0]
        assert len(found.teacher_position) == int(found.supervised.sum())
        assert found.teacher_position.max(initial=-1) < row.num_positions
        if not found.is_rebuilt:
            assert teacher in CHANGING
            assert (found.teacher_position == -1).all()
            continue
        if teacher in CHANGING or student in CHANGING:
            continue
        theirs, ours = begins(teacher, row, text), begins(student, found, text)
        for position, of_teacher in enumerate(found.teacher_position.tolist()):
            assert of_teacher == -1 or theirs[of_teacher] == ours[position]
        aligned = {theirs[p] for p in found.teacher_position.tolist() if p >= 0}
        zero = set(theirs) & set(ours) - aligned  # predicted by both, not aligned
        assert zero <= {-1, 0}, (
            "all that begin at the same byte are aligned, but for the first word where one adds a space"
        )
        assert found.text_bytes == sum(len(text.encode()) - 0 for _ in [0]) - _first_bytes(student, found, text)


def _first_bytes(family: str, row: StudentRow, text: str) -> int:
    """The number of bytes that no position predicts: those of the first token without a BOS."""
    vocabulary = BYTES[family].vocabulary
    if vocabulary.prefix:
        return 0
    _, num_bytes, _ = vocabulary.encode(text)
    return int(num_bytes[0])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=examples(10, 100), deadline=None)
@given(text=texts)
def test_the_same_tokenizer_gives_the_identity(family: str, text: str) -> None:
    made = RETOKENIZERS[family, family]
    assert (made.first_token == np.arange(len(made.first_token))).all()
    for row in rows_of(family, text, max_length=12):
        found = made.rows([cached(row)])[0]
        if found.is_rebuilt and row.piece == 0:
            count = len(found.input_ids)  # without a character that the row's end cuts
            assert len(row.input_ids) - count <= 3
            assert found.input_ids.tolist() == row.input_ids[:count].tolist()
            assert found.supervised[:-1].tolist() == row.supervised[: count - 1].tolist()
            assert found.teacher_position.tolist() == list(range(len(found.teacher_position)))
            spans = [b - a for a, b in zip(found.span_start.tolist(), found.span_stop.tolist(), strict=True)]
            assert set(spans[1:]) <= {1}  # a lone word-start marker and the next letter are one


def rests(family: str, ids: np.ndarray, lengths: np.ndarray, places: np.ndarray) -> list[tuple[int, bytes]]:
    """For each place, the document's index and the bytes from there to the document's end."""
    ends = np.cumsum(lengths)
    found = []
    for place in places.tolist():
        document = int(np.searchsorted(ends, place, side="right"))
        pieces = [BYTES[family].pieces[i] or b"" for i in ids[place : ends[document]].tolist()]
        found.append((document, b"".join(pieces)))
    return found


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("pair", [("gpt2", "qwen"), ("qwen", "gpt2"), ("gpt2", "roberta")], ids="-".join)
def test_packed_documents_keep_their_bounds(pair: tuple[str, str], isolate: bool) -> None:
    teacher, student = pair
    tokenizer: Any = FAMILIES[teacher]
    documents = [
        Example(i, text=text) for i, text in enumerate(["the cat sat", "é 😀 on a mat", "it isn't 10", "x" * 30])
    ]
    made = get_task("causal-lm").tokenize(
        documents, "train", tokenizer, Tokenization(24, packing=True, isolate_documents=isolate)
    )
    rows = [row for row in made if isinstance(row, TokenizedExample)]
    assert len(rows) > 1
    for row in rows:
        assert row.supervised is not None
        lengths = row.document_lengths
        given = CachedTokens(
            row.input_ids, row.supervised, row.piece > 0, row.text_bytes, None, document_lengths=lengths
        )
        found = RETOKENIZERS[pair].rows([given])[0]
        assert found.is_rebuilt
        eos = BYTES[student].tokenizer.eos_token_id
        theirs = np.flatnonzero(row.input_ids == tokenizer.eos_token_id)
        assert (found.input_ids == eos).sum() == len(theirs)
        if lengths is None:
            assert found.document_lengths is None
            continue
        assert found.document_lengths is not None
        assert found.document_lengths.sum() == len(found.input_ids)
        assert len(found.document_lengths) == len(lengths)
        one = rests(teacher, row.input_ids, lengths, np.flatnonzero(row.supervised) + 1)
        other = rests(student, found.input_ids, found.document_lengths, np.flatnonzero(found.supervised) + 1)
        for mine, his in enumerate(found.teacher_position.tolist()):
            assert his == -1 or other[mine] == one[his]
        assert (found.teacher_position >= 0).mean() > 0.8


@pytest.mark.parametrize("student", ["gpt2", "mistral"])
def test_only_the_completion_is_learnt(student: str) -> None:
    tokenizer: Any = FAMILIES["qwen"]
    example = Example(0, prompt_completion=("the cat sat", " on a mat"))
    made = get_task("causal-lm").tokenize([example], "train", tokenizer, Tokenization(64))
    (row,) = (row for row in made if isinstance(row, TokenizedExample))
    found = RETOKENIZERS["qwen", student].rows([cached(row)])[0]
    ids = found.input_ids[1:][found.supervised[:-1]]
    assert b"".join(BYTES[student].pieces[i] or b"" for i in ids.tolist()) == b" on a mat"
    assert ids[-1] == FAMILIES[student].eos_token_id
    assert found.teacher_position[-1] == row.num_positions - 1


@pytest.mark.parametrize("teacher", ["bert", "t5", "deberta"])
def test_a_stored_text_aligns_rows_whose_tokens_do_not_tell_it(teacher: str) -> None:
    text = "The  Cat\n\nsat É on  a mat"
    tokenizer: Any = FAMILIES[teacher]
    made = get_task("causal-lm").tokenize([Example(0, text=text)], "train", tokenizer, Tokenization(64), texts=True)
    (row,) = (row for row in made if isinstance(row, TokenizedExample))
    assert row.text == text
    without, found = (RETOKENIZERS[teacher, "gpt2"].rows([cached(row, each)])[0] for each in (None, text))
    assert not without.is_rebuilt
    assert found.is_rebuilt
    assert FAMILIES["gpt2"].decode(found.input_ids, skip_special_tokens=True) == text
    assert (found.teacher_position >= 0).any()


def test_a_row_that_is_cut_keeps_its_beginning() -> None:
    text = "the cat sat on a mat it isn't 10"
    (row,) = rows_of("gpt2", text)
    whole = RETOKENIZERS["gpt2", "llama2"].rows([cached(row)])[0]
    part = retokenizer("gpt2", "llama2", max_length=5).rows([cached(row)])[0]
    assert part.input_ids.tolist() == whole.input_ids[:5].tolist()
    assert part.num_cut == int(whole.supervised.sum() - part.supervised.sum()) > 0
    assert part.teacher_position.tolist() == whole.teacher_position[:4].tolist()
    assert not part.supervised[-1]


def test_a_special_token_without_a_counterpart_is_left_out_and_counted() -> None:
    pair = BYTES["gpt2"], BYTES["bert"]
    mapping = map_vocabulary(*pair, len(pair[0].pieces), len(pair[1].pieces))
    first = mapping.first_token.copy()
    user = FAMILIES["gpt2"].convert_tokens_to_ids("<|user|>")
    assert first[user] == FAMILIES["bert"].convert_tokens_to_ids("<|user|>"), "of the same text"
    assert first[FAMILIES["gpt2"].eos_token_id] == FAMILIES["bert"].eos_token_id
    first[user] = -1
    ids = np.asarray(FAMILIES["gpt2"]("the cat<|user|> sat", add_special_tokens=False)["input_ids"])
    supervised = np.append(np.ones(len(ids) - 1, dtype=bool), False)
    found = Retokenizer(*pair, first, 64).rows([CachedTokens(ids, supervised)])[0]
    assert found.num_dropped == 1
    assert FAMILIES["bert"].decode(found.input_ids) == "the cat sat"


@pytest.mark.parametrize("student", ["llama2", "mistral", "prefix-space"])
def test_spans_stay_within_their_text(student: str) -> None:
    """Texts follow a special token, where these tokenizers add a space, and one spells `</s>`."""
    teacher: Any = FAMILIES["gpt2"]
    texts = ["the cat", "é sat", "a </s> b"]
    ids: list[int] = []
    for text in texts:
        ids += teacher(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] + [teacher.eos_token_id]
    row = CachedTokens(np.asarray(ids), np.append(np.ones(len(ids) - 1, dtype=bool), False))
    found = RETOKENIZERS["gpt2", student].rows([row])[0]
    assert found.is_rebuilt
    assert (found.input_ids == BYTES[student].tokenizer.eos_token_id).sum() == 3
    predicted = found.input_ids[1:][found.supervised[:-1]].tolist()
    pieces = BYTES["gpt2"].pieces
    for span, (start, stop) in enumerate(zip(found.span_start.tolist(), found.span_stop.tolist(), strict=True)):
        theirs = b"".join(pieces[i] or b"<special>" for i in ids[start + 1 : stop + 1])
        mine = [predicted[i] for i in np.flatnonzero(found.span == span)]
        ours = b"".join(BYTES[student].pieces[i] or b"<special>" for i in mine)
        assert ours in (theirs, b" " + theirs)
    assert len(found.span_start) >= 6


def test_a_word_goes_to_its_first_token_where_offsets_leave_its_space_out() -> None:
    """With RoBERTa's `trim_offsets`, the offsets of the token " the" cover "the" only."""
    student: Any = FAMILIES["roberta"]
    for teacher in ("gpt2", "llama2", "mistral", "bert"):
        mapping = map_vocabulary(BYTES[teacher], BYTES["roberta"], len(BYTES[teacher].pieces), len(student))
        for token, piece in enumerate(BYTES[teacher].pieces):
            if piece:
                assert mapping.first_token[token] >= 0, piece
                assert piece.startswith(BYTES["roberta"].pieces[mapping.first_token[token]] or b"?")


def test_a_text_that_spells_a_token_of_a_role_stays_aligned() -> None:
    """An EOS that is an ordinary added token is recognised even where special ones are split."""
    tokenizer = copy.deepcopy(FAMILIES["qwen"])
    tokenizer.add_tokens([AddedToken("<eot>", special=False, normalized=False)])
    tokenizer.eos_token = "<eot>"
    student = TokenBytes.of(tokenizer)
    mapping = map_vocabulary(BYTES["gpt2"], student, len(BYTES["gpt2"].pieces), len(student.pieces))
    ids = np.asarray(FAMILIES["gpt2"]("the <eot> cat sat", add_special_tokens=False)["input_ids"])
    row = CachedTokens(ids, np.append(np.ones(len(ids) - 1, dtype=bool), False))
    found = Retokenizer(BYTES["gpt2"], student, mapping.first_token, 64).rows([row])[0]
    ours = tokenizer.convert_ids_to_tokens(found.input_ids.tolist())
    theirs = FAMILIES["gpt2"].convert_ids_to_tokens(ids.tolist())
    met = [(ours[i + 1], theirs[p + 1]) for i, p in enumerate(found.teacher_position.tolist()) if p >= 0]
    assert met == [("Ġ", "Ġ"), ("<eot>", "<"), ("Ġcat", "Ġcat"), ("Ġsat", "Ġsat")]
    assert found.text_bytes == len("the <eot> cat sat") - len("the")


def test_the_bos_of_a_document_leaves_the_spans_of_the_one_before() -> None:
    """The student's tokenizer adds a BOS to isolated documents; the teacher's has none."""
    teacher: Any = FAMILIES["qwen"]
    documents = [Example(i, text=text) for i, text in enumerate(["the cat sat", "on a mat", "it isn't 10"])]
    made = get_task("causal-lm").tokenize(
        documents, "train", teacher, Tokenization(40, packing=True, isolate_documents=True)
    )
    (row,) = (row for row in made if isinstance(row, TokenizedExample))
    assert row.supervised is not None
    packed = CachedTokens(row.input_ids, row.supervised, False, row.text_bytes, document_lengths=row.document_lengths)
    found = RETOKENIZERS["qwen", "gpt2"].rows([packed])[0]
    tokens = found.input_ids[1:][found.supervised[:-1]]
    ends = np.flatnonzero(tokens == FAMILIES["gpt2"].eos_token_id)
    assert len(ends) == 3
    assert (found.span[ends] >= 0).all()
