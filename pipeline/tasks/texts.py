"""The text or conversation that a row was made from, for students with another tokenizer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import BadRowError
from pipeline.records import Message

#: Selects tokens of a document: a slice, or an array of indices.
Index = slice | np.ndarray


@dataclass(frozen=True, slots=True)
class Covered:
    """A text, and the characters of it that each of T tokens stands for."""

    text: str
    starts: np.ndarray
    """(T,) int64: the first character of each token."""
    ends: np.ndarray
    """(T,) int64, exclusive; equal to the start if the token stands for no text, such as BOS."""

    @classmethod
    def of(cls, text: str, offsets: Sequence[tuple[int, int]]) -> Covered:
        """Build from the character offsets of a fast tokenizer.

        Every character is assigned to a token, as in `Vocabulary.bytes_of_text`. Of the characters
        between two tokens, those up to the first white space belong to the token before, the rest
        to the token after. Characters before the first token or after the last belong to that
        token. Tokens that share a character, such as its bytes, each get the whole character.
        """
        starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T.copy()
        end = last = 0
        for j in range(len(starts)):
            if starts[j] > end:
                cut = end
                while j and cut < starts[j] and not text[cut].isspace():
                    cut += 1
                if j:
                    ends[last] = cut
                starts[j] = cut if j else 0
            elif starts[j] == ends[j]:
                starts[j] = ends[j] = end
            if ends[j] > starts[j]:
                end, last = max(end, int(ends[j])), j
        if len(ends):
            ends[last] = len(text)
        return cls(text, starts, ends)

    def joined(self, other: Covered) -> Covered:
        """Append another text that was tokenized separately."""
        return self._with(self.text + other.text, other.starts + len(self.text), other.ends + len(self.text))

    def enclosed(self, before: int, after: int) -> Covered:
        """Add `before` tokens at the start and `after` at the end that stand for no text."""
        starts, ends = (
            np.concatenate([np.zeros(before, dtype=np.int64), values, np.full(after, len(self.text))])
            for values in (self.starts, self.ends)
        )
        return Covered(self.text, starts, ends)

    def _with(self, text: str, starts: np.ndarray, ends: np.ndarray) -> Covered:
        return Covered(text, np.concatenate([self.starts, starts]), np.concatenate([self.ends, ends]))

    def take(self, index: Index) -> Covered:
        """Select some of the tokens; the text stays whole."""
        return dataclasses.replace(self, starts=self.starts[index], ends=self.ends[index])

    @property
    def shown(self) -> str:
        """The part of the text that the tokens cover, from the first to the last."""
        real = self.ends > self.starts
        return self.text[int(self.starts[real].min()) : int(self.ends[real].max())] if real.any() else ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns that a row was rendered from, and which of them are trained on."""

    messages: Sequence[Message]
    """The turns in the row, from the first of the chat on."""
    tools: Sequence[Mapping[str, object]] | None
    learnt: tuple[int, ...]
    """Numbers of the assistant turns that this row trains on."""
    turn_of: np.ndarray | None
    """(T,) int64: the number of the turn that each supervised token belongs to, else -1; None: not
    known, since the template's marks do not match the turns."""

    def take(self, index: Index) -> Conversation:
        """Select some of the tokens of the row."""
        return self if self.turn_of is None else dataclasses.replace(self, turn_of=self.turn_of[index])

    def to_json(self, predicted: np.ndarray) -> str:
        """Return the value of the column `messages`, as JSON text.

        Its form is `{"messages": [...], "tools": [...] or null, "learnt": [...]}`.

        Args:
            predicted: (T,) bool: the predicted tokens. A turn without one, since truncation has
                removed it, is left out of `learnt`.
        """
        learnt = self.learnt
        if self.turn_of is not None:
            left = set(self.turn_of[predicted].tolist())
            learnt = tuple(number for number in learnt if number in left)
        turns = [
            {"role": each.role, **({} if each.content is None else {"content": each.content}), **each.fields}
            for each in self.messages
        ]
        content = {
            "messages": turns,
            "tools": None if self.tools is None else list(self.tools),
            "learnt": list(learnt),
        }
        text = json.dumps(content, ensure_ascii=False, default=str)
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair: JSON can escape it, UTF-8 cannot encode it
            text = json.dumps(content, default=str)
        return text


def read_conversation(text: str) -> tuple[tuple[Message, ...], tuple[Mapping[str, object], ...] | None]:
    """Parse the column `messages` of a row.

    Returns:
        The turns, with `learnt` set on those that the row trains on, and the tools.

    Raises:
        BadRowError: the text does not have the form that `Conversation.to_json` writes.
    """
    try:
        content = json.loads(text)
        turns, tools, learnt = (content[name] for name in ("messages", "tools", "learnt"))
        fine = isinstance(turns, list) and isinstance(learnt, list) and all(map(_is_turn, turns))
        fine = fine and all(isinstance(number, int) and 0 <= number < len(turns) for number in learnt)
        fine = fine and (tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)))
    except (ValueError, TypeError, LookupError, RecursionError):
        fine = False
    if not fine:
        raise BadRowError(
            "messages: expected the JSON text of messages, tools and the numbers of the turns that are learnt, found other text"
        )
    return tuple(_message(turn, number in learnt) for number, turn in enumerate(turns)), (
        None if tools is None else tuple(tools)
    )


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str | None)


def _message(turn: dict[str, Any], learnt: bool) -> Message:
    fields = {key: value for key, value in turn.items() if key not in ("role", "content")}
    return Message(turn["role"], turn.get("content"), fields, learnt)
