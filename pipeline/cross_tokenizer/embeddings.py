"""Initial embeddings of a student's tokens, from the teacher's tokens of the same bytes."""

from __future__ import annotations

from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipeline.cross_tokenizer.token_bytes import TokenBytes
from pipeline.cross_tokenizer.vocabulary_map import NONE, counterpart, counterparts
from pipeline.models.vocabulary import NewVocabulary
from pipeline.records import Ragged

_CHARACTERS = bytes_to_unicode()


def new_vocabulary(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, *, with_rows: bool
) -> NewVocabulary:
    """Describe a student's tokenizer relative to its teacher's.

    Args:
        with_rows: also find the teacher's tokens that initialize each row of the embedding.

    Raises:
        SourceError: one of the tokenizers changes a text when it adds special tokens.
    """
    same = partial(counterpart, teacher=teacher, student=student)
    if not with_rows:
        return NewVocabulary(student, same)
    theirs, ours = TokenBytes.of(teacher), TokenBytes.of(student)
    equal = counterparts(ours, theirs, len(ours.pieces))
    return NewVocabulary(student, same, _sources(equal, ours, theirs), int((equal != NONE).sum()))


def _sources(equal: np.ndarray, student: TokenBytes, teacher: TokenBytes) -> Ragged:
    """For each student token, the equal teacher token, else the teacher tokens of its bytes.

    Args:
        equal: (V,) the equal teacher token; -1: none.
    """
    by_bytes = {piece: i for i, piece in reversed(list(enumerate(teacher.pieces))) if piece}
    longest = max(map(len, by_bytes), default=0)
    found: list[list[int]] = []
    for token, piece in zip(equal.tolist(), student.pieces, strict=True):
        if token != NONE:
            found.append([token])
        elif not piece:
            found.append([])
        else:
            found.append(_merged(piece, teacher) or _longest_pieces(piece, by_bytes, longest))
    values = np.array([token for tokens in found for token in tokens], dtype=np.int64)
    return Ragged.of(values, np.array([len(tokens) for tokens in found], dtype=np.int64))


def _merged(piece: bytes, teacher: TokenBytes) -> list[int]:
    """Tokenize bytes by the merges of a byte-level vocabulary."""
    backend = getattr(teacher.tokenizer, "backend_tokenizer", None)
    if teacher.vocabulary.family != "byte-level" or backend is None:
        return []
    ids = [token.id for token in backend.model.tokenize("".join(_CHARACTERS[byte] for byte in piece))]
    return [i for i in ids if i < len(teacher.pieces) and teacher.pieces[i]]


def _longest_pieces(piece: bytes, by_bytes: dict[bytes, int], longest: int) -> list[int]:
    """Tokenize bytes greedily from left to right by the longest match, as WordPiece does.

    Bytes that match no token are skipped.
    """
    found, at = [], 0
    while at < len(piece):
        stops = range(min(len(piece), at + longest), at, -1)
        stop = next((stop for stop in stops if piece[at:stop] in by_bytes), None)
        if stop is not None:
            found.append(by_bytes[piece[at:stop]])
        at = at + 1 if stop is None else stop
    return found
