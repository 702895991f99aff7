"""What a row was made of, for students whose tokenizer is another one: its text, or the conversation that it was rendered from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import BadRowError
from pipeline.records import Message

#: Tokens of a document: those from one to another, or each by its number.
Index = slice | np.ndarray


@dataclass(frozen=True, slots=True)
class Covered:
    """The characters of a text that each of T tokens stands for."""

    text: str
    starts: np.ndarray
    """(T,) int64."""
    ends: np.ndarray
    """(T,) int64; where it equals the start, the token stands for no text, as BOS."""

    @classmethod
    def of(cls, text: str, offsets: Sequence[tuple[int, int]]) -> Covered:
        """By the characters that a fast tokenizer gives for each token.

        Every character belongs to a token, as in `Vocabulary.bytes_of_text`: of those between two
        tokens the ones up to the first white space to the token before, the others to the token
        after. What stands before the first token and behind the last one is theirs. Tokens that
        share a character, as its bytes, have it both.
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
        """This text and another behind it, tokenized apart."""
        return self._with(self.text + other.text, other.starts + len(self.text), other.ends + len(self.text))

    def enclosed(self, before: int, after: int) -> Covered:
        """With so many tokens before and after its own that stand for no text."""
        starts, ends = (
            np.concatenate([np.zeros(before, dtype=np.int64), values, np.full(after, len(self.text))])
            for values in (self.starts, self.ends)
        )
        return Covered(self.text, starts, ends)

    def _with(self, text: str, starts: np.ndarray, ends: np.ndarray) -> Covered:
        return Covered(text, np.concatenate([self.starts, starts]), np.concatenate([self.ends, ends]))

    def take(self, index: Index) -> Covered:
        """Of some of the tokens."""
        return dataclasses.replace(self, starts=self.starts[index], ends=self.ends[index])

    @property
    def shown(self) -> str:
        """The text from the first of the tokens to the last."""
        real = self.ends > self.starts
        return self.text[int(self.starts[real].min()) : int(self.ends[real].max())] if real.any() else ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns that a row was rendered from, and which of them it learns."""

    messages: Sequence[Message]
    """Those that are in the row, from the first of the chat."""
    tools: Sequence[Mapping[str, object]] | None
    learnt: tuple[int, ...]
    """Numbers of the assistant's turns that are to be learnt in this row."""
    turn_of: np.ndarray | None
    """(T,) int64: the number of the turn that a token to be learnt belongs to, else -1; None: the
    marks of the template do not tell."""

    def take(self, index: Index) -> Conversation:
        """Of some of the tokens of the row."""
        return self if self.turn_of is None else dataclasses.replace(self, turn_of=self.turn_of[index])

    def to_json(self, predicted: np.ndarray) -> str:
        """The column `messages`: `{"messages": [...], "tools": [...] or null, "learnt": [...]}`.

        Args:
            predicted: (T,) bool: the tokens that are learnt; a turn that was cut off is none of the
                learnt ones.
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
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
            text = json.dumps(content, default=str)
        return text


def read_conversation(text: str) -> tuple[tuple[Message, ...], tuple[Mapping[str, object], ...] | None]:
    """The column `messages` of a row -> the turns, those that the row learns marked `learnt`, and the tools.

    Raises:
        BadRowError: it is not what `Conversation.to_json` writes.
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
