"""Token ids of the prompt of a row, and of the labels that follow it.

Prompt and label are tokenized together once, for a prompt without a row. The tokens that the label
adds are its ids. They are the same for all rows.
"""

from __future__ import annotations

import dataclasses
import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.capture.teachers.judge.shots import Shot, Shots
from pipeline.capture.teachers.judge.template import Shown, Template
from pipeline.errors import BadRowError, MisuseError, SourceError
from pipeline.records import TokenizedExample
from pipeline.tasks.chats.templates import REFUSALS, Renderer

logger = logging.getLogger(__name__)

#: Inputs without content; their mean prediction is the prior of the labels (Zhao et al., 2021).
CONTENT_FREE = ("N/A", "[MASK]", "")
#: Number of tokens that a text may gain at its borders with the template.
_SEAM = 8
#: A label needs no space after these characters.
_OPENING = "\"'`([{<"


@dataclass(frozen=True, slots=True)
class Prompts:
    """Builds the prompts of rows; all settings are fixed before the first row."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    chat: Renderer | None
    """The chat template, which renders the prompt as the user's message; None: plain text."""
    label_texts: tuple[str, ...]
    shots: Shots
    paired: bool
    positions: int
    """Number of tokens that the model has positions for."""
    opening: str = ""
    """Text after every prompt: what the chat template writes between its generation prompt and an
    answer, such as the empty `<think>` block of Qwen3, unless it is only white space."""
    gap: str = ""
    """Chats: the white space between `opening` and the label."""
    label_ids: tuple[tuple[int, ...], ...] = ()
    """Token ids of each class, at least one."""
    leading_ids: tuple[int, ...] = ()
    """Token ids that the tokenizer puts before a text, such as BOS; chat templates write them
    themselves."""
    prefix: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """(P,) int64: the tokens that all prompts begin with."""
    overhead: int = 0
    """Number of tokens of a prompt with the longest label, without the texts of its row."""
    repeats: int = 1
    """How many times the template contains the row's texts."""

    @property
    def longest_text(self) -> int:
        """The largest number of tokens of a row that fits beside prompt and longest label."""
        return max((self.positions - self.overhead) // self.repeats - _SEAM, 0)

    def of_row(self, row: TokenizedExample) -> np.ndarray:
        """Return the (T,) int64 prompt of a row, with its text cut where the row's tokens are cut.

        Raises:
            BadRowError: see `fitted`.
        """
        text, pair = row.text or "", row.text_pair
        shots = self.shots.of(text, pair)
        if row.cut:
            text, pair = self._shorter(text, pair, row.num_tokens)
        return self.fitted(text, pair, shots)

    def fitted(self, text: str, pair: str | None, shots: Sequence[Shot] | None = None) -> np.ndarray:
        """Return the (T,) int64 prompt of a text; cut the end of the text if it does not fit.

        Args:
            shots: the examples; default: those of most rows.

        Raises:
            BadRowError: not a single token of the text fits.
        """
        most = self.positions - max(map(len, self.label_ids), default=0)
        ids = self.ids(text, pair, shots)
        size = len(self.tokenizer(text, pair, verbose=False)["input_ids"]) if len(ids) > most else 0
        while len(ids) > most:
            size = max(size - (len(ids) - most) // self.repeats - _SEAM, min(size - 1, 1))
            text, pair = self._shorter(text, pair, size)
            ids = self.ids(text, pair, shots)
        return ids

    def _shorter(self, text: str, pair: str | None, tokens: int) -> tuple[str, str | None]:
        found = _cut(self.tokenizer, text, pair, tokens)
        if not found[0] or (pair and not found[1]):
            raise BadRowError(
                f"no room for the text in the prompt: {max(tokens, 0)} tokens are left for it; use a shorter prompt"
            )
        return found

    def ids(self, text: str, pair: str | None, shots: Sequence[Shot] | None = None) -> np.ndarray:
        """Return the (T,) int64 prompt of a text, without cutting."""
        return np.asarray(self._tokens(self.text(text, pair, shots)), dtype=np.int64)

    def text(
        self, text: str, pair: str | None, shots: Sequence[Shot] | None = None, *, answer: str | None = None
    ) -> str:
        """Return the text of the prompt.

        Args:
            shots: see `fitted`.
            answer: chats: append this answer as the assistant's turn, to find out how the template
                writes turns.
        """
        shown = [
            Shown(shot.shown, shot.shown_pair if self.paired else None, self.label_texts[shot.label])
            for shot in (self.shots.chosen if shots is None else shots)
        ]
        message = self.template.render(text, pair if self.paired else None, self.label_texts, shown)
        if self.chat is None:
            return message.rstrip(" ")
        turns = [{"role": "user", "content": message}]
        try:
            if answer is not None:
                return self.chat([*turns, {"role": "assistant", "content": answer}])[0]
            return self.chat(turns, prompt=True)[0] + self.opening
        except REFUSALS as error:
            raise SourceError(
                f"the chat template does not take a prompt: {' '.join(str(error).split())}; use --prompt-format plain"
            ) from None

    def _tokens(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        leading = list(self.leading_ids)
        return found if self.chat is not None or found[: len(leading)] == leading else leading + found

    def label_tokens(self) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of each label after a prompt.

        Raises:
            MisuseError: a label adds no token, changes the tokens of the prompt, or has the ids of
                another label.
        """
        prompt = self.text("", "" if self.paired else None)
        before = self._tokens(prompt)
        found: dict[tuple[int, ...], str] = {}
        for text in self.label_texts:
            whole = self._tokens(prompt + self._gap(prompt, text) + text)
            where = f"--label-text: {text!r}"
            if whole[: len(before)] != before:
                raise MisuseError(
                    f"{where}: the tokenizer merges its first token with the prompt's last one ({prompt[-12:]!r} and the label), so that the prompt has no tokens of its own; "
                    "end the template with a line end or a colon"
                )
            ids = tuple(whole[len(before) :])
            if not ids:
                raise MisuseError(f"{where}: the tokenizer makes no token of it; give the label another text")
            if ids in found:
                raise MisuseError(
                    f"{where}: has the tokens of the label {found[ids]!r}, so that nothing tells the two apart; give one of them another text"
                )
            found[ids] = text
        return tuple(found)

    def _gap(self, prompt: str, label: str) -> str:
        """Return the text between prompt and label.

        In a chat, it is the white space that the chat template writes. Otherwise it is a space, or
        nothing where words are not separated by spaces.
        """
        if self.chat is not None:
            return self.gap
        last = prompt[-1:]
        wide = unicodedata.east_asian_width(last or " ") in ("W", "F")
        return "" if not last or last.isspace() or label[:1].isspace() or wide or last in _OPENING else " "

    def opened(self) -> Prompts:
        """Return the prompts with `opening` and `gap` as the chat template writes them."""
        if self.chat is None:
            return self
        second = "" if self.paired else None
        prompt = self.text("", second)
        # Two answers with different beginnings: their common prefix is what precedes an answer.
        answered, other = (self.text("", second, answer=answer) for answer in ("Answer", "Reply"))
        answered = answered[: _alike(answered, other)]
        if not answered.startswith(prompt):
            logger.warning(
                "the chat template ends the prompt with %r, and does not put that before an answer: labels are scored at a place where the model may not begin an answer; "
                "give an argument that leaves it out (--chat-template-kwargs enable_thinking=false in many templates), or --prompt-format plain",
                prompt[_alike(answered, prompt) :],
            )
            return self
        between = answered[len(prompt) :]
        opening = between.rstrip(" ") if between.strip() else ""
        if opening:
            logger.info("the chat template writes %r before an answer; it is appended to every prompt", opening)
        return dataclasses.replace(self, opening=opening, gap=between[len(opening) :])


def _alike(one: str, other: str) -> int:
    """Return the length of the common prefix of two strings."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the token ids that a tokenizer puts before every text: BOS, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return tuple(whole[:start])


def common_prefix(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return the longest common prefix that leaves at least one token of each row."""
    least = min(map(len, rows)) - 1
    same = np.stack([row[:least] == rows[0][:least] for row in rows]).all(0)
    found: np.ndarray = rows[0][: least if same.all() else int(same.argmin())]
    return found


def cut_shot(tokenizer: PreTrainedTokenizerBase, shot: Shot, tokens: int) -> Shot:
    """Cut the texts of an example to at most `tokens` tokens each."""
    text, _ = _cut(tokenizer, shot.text, None, tokens, special=False)
    pair = None if shot.text_pair is None else _cut(tokenizer, shot.text_pair, None, tokens, special=False)[0]
    return dataclasses.replace(shot, shown=text, shown_pair=pair)


def _cut(
    tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None, tokens: int, *, special: bool = True
) -> tuple[str, str | None]:
    """Cut a text, or a pair of texts, to its first `tokens` tokens.

    Args:
        special: count the special tokens that the tokenizer adds, as in rows of a cache.
    """
    if tokens <= 0:
        return "", None if pair is None else ""
    made = tokenizer(
        text,
        pair,
        truncation=True,
        max_length=tokens,
        add_special_tokens=special,
        return_offsets_mapping=tokenizer.is_fast,
    )
    if not tokenizer.is_fast:  # no offsets: decode the tokens
        first = str(tokenizer.decode(made["input_ids"], skip_special_tokens=True))
        return (first, None) if pair is None else (text[: len(first)], pair)
    ends = [0, 0]
    for which, (_, stop) in zip(made.sequence_ids(), made["offset_mapping"], strict=True):
        if which is not None:
            ends[which] = max(ends[which], stop)
    return text[: ends[0]], None if pair is None else pair[: ends[1]]
