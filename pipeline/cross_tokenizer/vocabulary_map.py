"""Which token of a student each token of a teacher becomes: the first one of its bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipeline.cross_tokenizer.token_bytes import TokenBytes
from pipeline.records import VocabularyMap

#: The teacher's token has no counterpart in the student's vocabulary.
NONE = -1
_CHARACTERS = bytes_to_unicode()
#: Texts put before a token that does not start a word; the first one after which a token of the
#: student begins is used.
_ANCHORS = ("\n", ".", "a", "1", "-")
_ROLES = ("eos_token_id", "bos_token_id", "sep_token_id", "cls_token_id", "pad_token_id", "mask_token_id")


def map_vocabulary(teacher: TokenBytes, student: TokenBytes, num_teacher: int, num_student: int) -> VocabularyMap:
    """Map each of the teacher's classes to a class of the student.

    A token maps to the token of equal bytes, else to the first token of the student's tokenization
    of its bytes as the continuation of a text. A special token maps to the one of equal text, else
    of the same role.

    Args:
        num_teacher: classes of the cache.
        num_student: classes of the student's output.
    """
    first = counterparts(teacher, student, num_teacher)
    left = [i for i in np.flatnonzero(first == NONE).tolist() if i < len(teacher.pieces) and teacher.pieces[i]]
    texts: list[str] = []
    numbers: list[int] = []
    for i in left:
        piece = teacher.pieces[i] or b""
        try:
            texts.append(piece.decode())
            numbers.append(i)
        except UnicodeDecodeError:
            first[i] = _first_of_bytes(piece, student)
    first[numbers] = _first_tokens(texts, student)
    first[first >= num_student] = NONE
    special = np.zeros(num_student, dtype=bool)
    shared = min(num_student, len(student.is_special))
    special[:shared] = student.is_special[:shared]
    return VocabularyMap(first, num_student, special)


def counterparts(teacher: TokenBytes, student: TokenBytes, num_teacher: int) -> np.ndarray:
    """(num_teacher,) int64: the student token of equal bytes; -1: none.

    For special tokens, the one of equal text or role.
    """
    first = np.full(num_teacher, NONE, dtype=np.int64)
    _map_equal(first, teacher, student)
    _map_special(first, teacher, student)
    return first


def counterpart(token: int, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> int | None:
    """The student's special token with the text of a teacher's, else with its role; or None."""
    name = teacher.convert_ids_to_tokens(token)
    if name in student.all_special_tokens or name in student.get_added_vocab():
        found: Any = student.convert_tokens_to_ids(str(name))
        return int(found)
    for role in _ROLES:
        if getattr(teacher, role, None) == token and getattr(student, role, None) is not None:
            return int(getattr(student, role))
    if token in _ends_of_turns(teacher):  # generation stops there, as at EOS
        ends = _ends_of_turns(student)
        return ends[0] if ends else student.eos_token_id
    return None


def _ends_of_turns(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens at the end of an answer in the chat template; none without one."""
    if not tokenizer.chat_template:
        return []
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # the template may raise any error on this chat
        return []
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    ids = tokenizer(text[text.rfind("b") + 1 :], add_special_tokens=False)["input_ids"]
    return [int(i) for i in ids if i in special]


def _map_equal(first: np.ndarray, teacher: TokenBytes, student: TokenBytes) -> None:
    """Map tokens of equal bytes.

    Several tokens may have the same bytes. If both vocabularies spell bytes alike, the token of
    equal spelling is chosen.
    """
    if teacher.vocabulary.family == student.vocabulary.family:
        names = student.tokenizer.get_vocab()
        spelled = teacher.tokenizer.convert_ids_to_tokens(list(range(min(len(first), len(teacher.pieces)))))
        for i, name in enumerate(spelled):
            other = names.get(name)
            if other is not None and teacher.pieces[i] and student.pieces[other] == teacher.pieces[i]:
                first[i] = other
    by_bytes: dict[bytes, int] = {}
    for i, piece in enumerate(student.pieces):
        if piece:
            kept = by_bytes.setdefault(piece, i)
            if _is_byte(student, kept):  # prefer text to a byte-fallback token
                by_bytes[piece] = i
    for i in np.flatnonzero(first == NONE).tolist():
        if i < len(teacher.pieces) and teacher.pieces[i]:
            first[i] = by_bytes.get(teacher.pieces[i] or b"", NONE)


def _is_byte(student: TokenBytes, token: int) -> bool:
    return str(student.tokenizer.convert_ids_to_tokens(token)).startswith("<0x")


def _map_special(first: np.ndarray, teacher: TokenBytes, student: TokenBytes) -> None:
    for i in np.flatnonzero(teacher.is_special[: len(first)]).tolist():
        found = counterpart(i, teacher.tokenizer, student.tokenizer)
        first[i] = NONE if found is None else found
    unknown, theirs = teacher.tokenizer.unk_token_id, student.tokenizer.unk_token_id
    if unknown is not None and unknown < len(first) and first[unknown] == NONE and theirs is not None:
        first[unknown] = theirs


def _first_of_bytes(piece: bytes, student: TokenBytes) -> int:
    """The first token of bytes that are not valid UTF-8, such as a part of a character."""
    if student.vocabulary.family == "byte-level":
        raw = getattr(student.tokenizer, "backend_tokenizer", None)
        found = [] if raw is None else raw.model.tokenize("".join(_CHARACTERS[byte] for byte in piece))
        if found:
            return int(found[0].id)
    whole = piece.decode(errors="ignore")
    if whole and piece.startswith(whole.encode()):
        return int(_first_tokens([whole], student)[0])
    token = student.tokenizer.convert_tokens_to_ids(f"<0x{piece[0]:02X}>")
    unknown = student.tokenizer.unk_token_id
    if isinstance(token, int) and token != unknown:
        return token
    return NONE if unknown is None else int(unknown)


def _first_tokens(texts: list[str], student: TokenBytes) -> np.ndarray:
    """(texts,) int64: the first token of each text as the continuation of another text."""
    out = np.full(len(texts), NONE, dtype=np.int64)
    if not student.vocabulary.joins_words:
        out[:] = _first_after("", texts, student)
        return out
    wordpiece = student.vocabulary.family == "wordpiece"
    begins = np.array([text.startswith(" ") or (wordpiece and text[:1].isspace()) for text in texts], dtype=bool)
    words = np.flatnonzero(begins)
    stripped = [texts[i].lstrip() if wordpiece else texts[i][1:] for i in words.tolist()]
    out[words] = [ids[0] if ids else NONE for ids in _encode(stripped, student)["input_ids"]]
    if wordpiece:
        inside = np.flatnonzero(~begins).tolist()
        out[inside] = [_inside_word(texts[i], student) for i in inside]
        return out
    spaces = [i for i in words.tolist() if texts[i] == " "]
    out[spaces] = next((i for i, piece in enumerate(student.pieces) if piece == b" "), NONE)
    for anchor in _ANCHORS:
        waiting = np.flatnonzero((out == NONE) & ~begins)
        out[waiting] = _first_after(anchor, [texts[i] for i in waiting.tolist()], student)
    return out


def _inside_word(text: str, student: TokenBytes) -> int:
    """WordPiece: the longest continuation piece; punctuation is a word of its own."""
    names = student.tokenizer.get_vocab()
    ids = _encode([text], student)["input_ids"][0]
    alone = str(student.tokenizer.convert_ids_to_tokens(ids[0])) if ids else ""
    if alone and not alone[0].isalnum():
        return int(ids[0])
    normal = text if not ids else student.tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    lengths = range(len(normal), 0, -1)
    return next((names[f"##{normal[:n]}"] for n in lengths if f"##{normal[:n]}" in names), NONE)


def _encode(texts: list[str], student: TokenBytes) -> Any:
    if not texts:
        return {"input_ids": [], "offset_mapping": []}
    return student.tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )


def _first_after(anchor: str, texts: list[str], student: TokenBytes) -> np.ndarray:
    """(texts,) int64: the first token that begins where the anchor ends; -1: none."""
    out = np.full(len(texts), NONE, dtype=np.int64)
    behind = len(anchor.encode())
    found = _encode([anchor + text for text in texts], student)
    for i, (ids, offsets) in enumerate(zip(found["input_ids"], found["offset_mapping"], strict=True)):
        # compare bytes, as the alignment of rows does: offsets may exclude the leading space of a
        # word (`trim_offsets`)
        sizes = student.vocabulary.bytes_of_text(anchor + texts[i], np.asarray(ids, dtype=np.int32), offsets)
        starts = np.cumsum(sizes) - sizes
        at = next(iter(np.flatnonzero((starts == behind) & (sizes > 0)).tolist()), None)
        piece = None if at is None else student.pieces[ids[at]]
        if piece and (not anchor or texts[i].encode().startswith(piece)):
            out[i] = ids[at]
    return out
