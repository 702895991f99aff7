"""The number of UTF-8 bytes of text that each token stands for; 0 for special tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.errors import SourceError

Family = Literal["byte-level", "metaspace", "wordpiece", "other"]

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACES = ("\u2581", "\u0120")  # the space in metaspace and in byte-level pieces


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer and the properties of its vocabulary."""

    tokenizer: PreTrainedTokenizerBase
    family: Family
    special: frozenset[int]
    """Tokens that stand for no text. The unknown token and byte tokens stand for text."""
    literal: Mapping[int, str]
    """Added tokens that stand for their own text."""
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    """Special tokens that the tokenizer adds before (`prefix`) and after a text, such as BOS and
    EOS."""
    adds_space: bool
    """Whether the first word of a text is tokenized as if a space preceded it."""
    adds_space_after_special: bool
    """Whether the first word after a special token is tokenized as if a space preceded it."""

    @property
    def joins_words(self) -> bool:
        """Whether the start of a text is always tokenized as the start of a word.

        The tokens of two texts are then not the tokens of the joined text.
        """
        return self.adds_space or self.family == "wordpiece"

    def enclose(self, ids: np.ndarray, num_bytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add `prefix` and `suffix` to the tokens of a text, each unless it is already there."""
        return _append(*self.open(ids, num_bytes), self.suffix)

    def open(self, ids: np.ndarray, num_bytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add `prefix` before the tokens of a text, unless it is already there."""
        if _starts_with(ids, self.prefix):
            return ids, num_bytes
        before = len(self.prefix)
        return _ids([*self.prefix, *ids]), np.append(np.zeros(before, dtype=np.int64), num_bytes)

    def close(self, ids: np.ndarray, num_bytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add EOS, if the tokenizer has one, after the tokens of a text, unless it is there."""
        eos = self.tokenizer.eos_token_id
        return _append(ids, num_bytes, () if eos is None else (eos,))

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """Tokenize a text, without `prefix` and `suffix`.

        Returns:
            (T,) int32 token ids; (T,) int64 bytes of text that each token stands for; and the
            character offsets of each token, empty if the tokenizer is not fast.
        """
        fast = bool(self.tokenizer.is_fast)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast)
        ids = _ids(encoded["input_ids"])
        if not fast:
            return ids, self.bytes_of_ids(ids), []
        offsets: list[tuple[int, int]] = encoded["offset_mapping"]
        return ids, self.bytes_of_text(text, ids, offsets), offsets

    def bytes_of_text(self, text: str, ids: np.ndarray, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
        """Return the (T,) int64 number of bytes of the text that each token stands for.

        White space between two tokens belongs to the second token. Other characters that no token
        covers (combining marks that the normalizer removes) belong to the first. Tokens that cover
        the same character (its bytes, or an added space) share its bytes in proportion to the
        lengths of their pieces; this is exact for byte-level pieces.
        """
        if not len(ids):
            return np.zeros(0, dtype=np.int64)
        code = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        position = np.zeros(len(text) + 1, dtype=np.int64)  # character -> byte
        position[1:] = np.cumsum(1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000))
        starts, ends = np.asarray(offsets, dtype=np.int64).T
        special = [token in self.special for token in ids.tolist()]
        if starts[0] == 0 and ends[-1] == len(text) and (starts[1:] == ends[:-1]).all() and not any(special):
            return np.diff(position[ends], prepend=0)
        return self._shared_bytes(text, ids, list(zip(starts.tolist(), ends.tolist(), strict=True)), special, position)

    def _shared_bytes(
        self,
        text: str,
        ids: np.ndarray,
        offsets: list[tuple[int, int]],
        special: list[bool],
        position: np.ndarray,
    ) -> np.ndarray:
        out = np.zeros(len(ids), dtype=np.int64)
        first, begin, end = 0, 0, 0  # tokens [first, i) cover the characters [begin, end)
        for i, (_, stop) in enumerate(offsets):
            end = max(end, stop)
            following = offsets[i + 1][0] if i + 1 < len(offsets) else len(text)
            shared = following < end or (end == begin and not special[i])
            if i + 1 < len(offsets) and shared and not special[i] and not special[i + 1]:
                continue
            while end < following and not text[end].isspace():
                end += 1
            if self.family == "byte-level" and i + 1 == len(offsets):  # byte-level drops no white space
                end = len(text)
            if not special[i]:
                total = int(position[end] - position[begin])
                added = begin < end and not text[begin].isspace()
                out[first : i + 1] = self._share(ids[first : i + 1], total, space_added=added)
            first, begin = i + 1, end
        return out

    def _share(self, ids: np.ndarray, total: int, *, space_added: bool) -> np.ndarray:
        """Divide `total` bytes in proportion to the pieces; later tokens get the remainders."""
        if len(ids) == 1:
            return np.full(1, total, dtype=np.int64)
        lengths = [self._length(int(token)) for token in ids]
        lengths[0] -= space_added and self._piece(int(ids[0])).startswith(_SPACES)
        upto = np.cumsum(lengths)
        shares: np.ndarray = np.diff(total * upto // max(upto[-1], 1), prepend=0)
        return shares

    def bytes_of_ids(self, ids: np.ndarray) -> np.ndarray:
        """Return the (T,) int64 number of text bytes per token if the text itself is not known."""
        out = np.zeros(len(ids), dtype=np.int64)
        start, after_special = True, False
        for i, token in enumerate(ids.tolist()):
            if token in self.special:
                after_special = not start or after_special
                continue
            if token != self.tokenizer.unk_token_id:  # the text of an unknown token is not known
                out[i] = self._length(token)
            added = (start and self.adds_space) or (after_special and self.adds_space_after_special)
            if self.family == "wordpiece":
                out[i] += not start and not self._piece(token).startswith("##")
            elif added and out[i] and token not in self.literal and self._piece(token).startswith(_SPACES):
                out[i] -= 1
            start, after_special = False, False
        return out

    def _piece(self, token: int) -> str:
        piece: Any = self.tokenizer.convert_ids_to_tokens(token)
        return "" if piece is None else str(piece)

    def _length(self, token: int) -> int:
        """Return the number of bytes of one piece, a leading space included."""
        if token in self.literal:
            return len(self.literal[token].encode())
        piece = self._piece(token)
        if self.family == "byte-level":
            return len(piece)  # one character per byte
        if _BYTE.fullmatch(piece):
            return 1
        if self.family == "metaspace":
            return len(piece.replace("\u2581", " ").encode())
        if self.family == "wordpiece":
            return len(piece.removeprefix("##").encode())
        text: Any = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return len(text.encode("utf-8", "replace"))


def read_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Determine the properties of a tokenizer's vocabulary.

    Raises:
        SourceError: the tokens of a text differ if the tokenizer adds special tokens.
    """
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    special -= {tokenizer.unk_token_id} | {i for i, token in added.items() if _BYTE.fullmatch(token.content)}
    literal = {i: t.content for i, t in added.items() if i not in special and not _BYTE.fullmatch(t.content)}
    bare, whole = (list(tokenizer("a", add_special_tokens=each)["input_ids"]) for each in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    if at is None:
        raise SourceError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: expected special tokens before and after the tokens of a text, "
            f"found {whole} for {bare}; use another tokenizer, or give token ids with --input-ids-column"
        )
    end = next((i for i in sorted(special) if added.get(i) is not None and not added[i].rstrip), None)
    after = [] if end is None else list(tokenizer(f"{added[end].content}a", add_special_tokens=False)["input_ids"])
    return Vocabulary(
        tokenizer=tokenizer,
        family=_family(tokenizer),
        special=frozenset(special),
        literal=literal,
        prefix=tuple(whole[:at]),
        suffix=tuple(whole[at + len(bare) :]),
        adds_space=_starts_with_space(tokenizer, bare),
        adds_space_after_special=bool(after) and after[0] == end and _starts_with_space(tokenizer, after[1:]),
    )


def _family(tokenizer: PreTrainedTokenizerBase) -> Family:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return (
            "byte-level"
            if hasattr(tokenizer, "byte_encoder")
            else "metaspace"
            if hasattr(tokenizer, "sp_model")
            else "other"
        )
    if type(backend.model).__name__ == "WordPiece":
        return "wordpiece"
    parts = f"{backend.decoder!r} {backend.pre_tokenizer!r}"
    if "ByteLevel" in parts:
        return "byte-level"
    return "metaspace" if "Metaspace" in parts or "\u2581" in parts else "other"


def _starts_with_space(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> bool:
    piece: Any = tokenizer.convert_ids_to_tokens(ids[0]) if ids else ""
    return str(piece).startswith(_SPACES)


def _append(ids: np.ndarray, num_bytes: np.ndarray, tokens: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    if _starts_with(ids[::-1], tokens[::-1]):
        return ids, num_bytes
    return _ids([*ids, *tokens]), np.append(num_bytes, np.zeros(len(tokens), dtype=np.int64))


def _starts_with(ids: np.ndarray, wanted: tuple[int, ...]) -> bool:
    return tuple(ids[: len(wanted)].tolist()) == wanted


def _ids(values: Sequence[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)
