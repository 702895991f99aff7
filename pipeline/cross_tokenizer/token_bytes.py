"""The bytes that each token of a vocabulary stands for, and the text of rows of token ids."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipeline.tasks.pieces import Vocabulary, read_vocabulary

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class Run:
    """The text between two special tokens of a row, and the byte ranges of its T tokens."""

    first: int
    """Index in the row of the first token of the run."""
    text: bytes
    starts: np.ndarray
    """(T,) int64: offset in `text` of the first byte of each token. A token without bytes begins
    where the next one does."""
    ends: np.ndarray
    """(T,) int64: offset after the last byte of each token."""
    adds_space: bool
    """Whether the first token begins with a space that the tokenizer added and `text` does not
    have."""
    is_exact: bool
    """False: the text of a token is not known, for example of an unknown token."""


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """The bytes of each token of a vocabulary of V tokens."""

    vocabulary: Vocabulary
    pieces: tuple[bytes | None, ...]
    """The bytes of each id, with the leading space of a word. None: the token has no text, or its
    text is not known."""
    is_special: np.ndarray
    """(V,) bool: the token has no text."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the vocabulary."""
        return self.vocabulary.tokenizer

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
        """Read all tokens of a tokenizer.

        Raises:
            SourceError: the tokenizer changes a text when it adds special tokens.
        """
        vocabulary = read_vocabulary(tokenizer)
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        special = np.zeros(len(names), dtype=bool)
        special[[i for i in vocabulary.special if i < len(names)]] = True
        pieces = [
            None if special[i] or i == tokenizer.unk_token_id or name is None else _bytes(vocabulary, i, name)
            for i, name in enumerate(names)
        ]
        return cls(vocabulary, tuple(pieces), special)

    def runs(self, ids: np.ndarray, *, continues: bool = False) -> Iterator[Run]:
        """The texts of a row of token ids, between its special tokens.

        Args:
            continues: the row begins inside a text, where tokenizers add no space before the first
                word.
        """
        known = ids < len(self.pieces)
        special = np.where(known, self.is_special[np.where(known, ids, 0)], False)
        bounds = np.flatnonzero(special)
        is_first = True
        for start, stop in zip(np.append(0, bounds + 1), np.append(bounds, len(ids)), strict=True):
            if start < stop:
                yield self._run(ids[start:stop], int(start), is_first=is_first, continues=continues and is_first)
                is_first = False

    def _run(self, ids: np.ndarray, first: int, *, is_first: bool, continues: bool) -> Run:
        found = [self.pieces[i] if i < len(self.pieces) else None for i in ids.tolist()]
        pieces = [b"" if piece is None else piece for piece in found]
        has_space = pieces[0][:1] == b" " and int(ids[0]) not in self.vocabulary.literal
        adds_space = has_space and not continues and self._adds_space(is_first=is_first)
        if adds_space:
            pieces[0] = pieces[0][1:]
        ends = np.cumsum([len(piece) for piece in pieces])
        return Run(first, b"".join(pieces), np.append(0, ends[:-1]), ends, adds_space, None not in found)

    def begins_with_added_space(self, token: int, num_bytes: int) -> bool:
        """Whether a token that covers `num_bytes` of a text begins with a space not in the text."""
        piece = self.pieces[token] or b""
        return piece[:1] == b" " and len(piece) > num_bytes

    def _adds_space(self, *, is_first: bool) -> bool:
        """Whether the tokenizer adds a space before a run: the first of a text, or a later one."""
        if self.vocabulary.family == "wordpiece":
            return is_first
        return self.vocabulary.adds_space if is_first else self.vocabulary.adds_space_after_special


def _bytes(vocabulary: Vocabulary, token: int, name: str) -> bytes:
    if token in vocabulary.literal:
        return vocabulary.literal[token].encode()
    if vocabulary.family == "byte-level":
        return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode() for c in name)
    found = _BYTE_TOKEN.fullmatch(name)
    if found is not None:
        return bytes([int(found[1], 16)])
    if vocabulary.family == "metaspace":
        return name.replace(_METASPACE, " ").encode()
    if vocabulary.family == "wordpiece":
        return name.removeprefix("##").encode() if name.startswith("##") else b" " + name.encode()
    text = str(vocabulary.tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return text.encode("utf-8", "surrogatepass")
