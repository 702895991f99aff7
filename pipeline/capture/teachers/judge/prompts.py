"""From a row to the token ids of its prompt, and from the labels to the ids that stand after it.

Prompt and label are tokenised together once, for a prompt without a row: what the label adds is its
token ids. So a label's ids are those that the tokenizer gives it behind the end of the template,
and are the same for all rows.
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

#: Inputs without content, whose mean prediction is the labels' prior (Zhao et al., 2021).
CONTENT_FREE = ("N/A", "[MASK]", "")
#: Tokens that a text may gain where it meets the template, over those that it has by itself.
_SEAM = 8
#: Behind these a label needs no space.
_OPENING = "\"'`([{<"


@dataclass(frozen=True, slots=True)
class Prompts:
    """Makes prompts: everything about them is fixed before the first row."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    chat: Renderer | None
    """The chat template, in which the rendered prompt is the user's message; None: it is the text
    itself."""
    label_texts: tuple[str, ...]
    shots: Shots
    paired: bool
    positions: int
    """Tokens that the model has positions for."""
    opening: str = ""
    """Behind the prompt of every row: what the chat template writes between its generation prompt
    and an answer, as the empty `<think>` block of Qwen3, if that is more than white space."""
    gap: str = ""
    """Between that and the label, in a chat: white space."""
    label_ids: tuple[tuple[int, ...], ...] = ()
    """Of each class, at least one."""
    leading_ids: tuple[int, ...] = ()
    """What the tokenizer puts before a text, BOS; a chat template writes it itself."""
    prefix: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """(P,) int64: the tokens that all prompts begin with."""
    overhead: int = 0
    """Tokens of a prompt beside the texts of its row, with the longest label."""
    repeats: int = 1
    """How often the template shows the row's texts."""

    @property
    def longest_text(self) -> int:
        """Tokens of a row that the model has positions for, beside the prompt and the longest label."""
        return max((self.positions - self.overhead) // self.repeats - _SEAM, 0)

    def of_row(self, row: TokenizedExample) -> np.ndarray:
        """(T,) int64: the prompt of a row, whose text is cut where the row's tokens are.

        Raises:
            BadRowError: as `fitted`.
        """
        text, pair = row.text or "", row.text_pair
        shots = self.shots.of(text, pair)
        if row.cut:
            text, pair = self._shorter(text, pair, row.num_tokens)
        return self.fitted(text, pair, shots)

    def fitted(self, text: str, pair: str | None, shots: Sequence[Shot] | None = None) -> np.ndarray:
        """(T,) int64: the prompt of a text, which loses tokens of its end where model and labels leave no room.

        Args:
            shots: the examples; default: those of most rows.

        Raises:
            BadRowError: there is room for none of its tokens.
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
        """(T,) int64: the prompt of a text as it is."""
        return np.asarray(self._tokens(self.text(text, pair, shots)), dtype=np.int64)

    def text(
        self, text: str, pair: str | None, shots: Sequence[Shot] | None = None, *, answer: str | None = None
    ) -> str:
        """The prompt as the model reads it.

        Args:
            shots: as in `fitted`.
            answer: with it as the assistant's turn, in a chat; for how the template writes turns.
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
        """The token ids of each label, behind a prompt.

        Raises:
            MisuseError: a label adds no token, changes those of the prompt, or has the ids of
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
                    f"{where}: its first token and the prompt's last become one ({prompt[-12:]!r} and the label), so that the prompt has no tokens of its own; "
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
        """What stands between prompt and label: in a chat what its template writes there, else a space where words have one."""
        if self.chat is not None:
            return self.gap
        last = prompt[-1:]
        wide = unicodedata.east_asian_width(last or " ") in ("W", "F")
        return "" if not last or last.isspace() or label[:1].isspace() or wide or last in _OPENING else " "

    def opened(self) -> Prompts:
        """With `opening` and `gap`, as the chat template writes the assistant's turns."""
        if self.chat is None:
            return self
        second = "" if self.paired else None
        prompt = self.text("", second)
        # Two answers that begin differently: what stands before an answer is what both have.
        answered, other = (self.text("", second, answer=answer) for answer in ("Answer", "Reply"))
        answered = answered[: _alike(answered, other)]
        if not answered.startswith(prompt):
            logger.warning(
                "the chat template ends the prompt with %r, and does not write that before an answer: labels are scored behind it, where the model may not begin an answer; "
                "give an argument that leaves it out (--chat-template-kwargs enable_thinking=false in many templates), or --prompt-format plain",
                prompt[_alike(answered, prompt) :],
            )
            return self
        between = answered[len(prompt) :]
        opening = between.rstrip(" ") if between.strip() else ""
        if opening:
            logger.info("the chat template writes %r before an answer: it stands behind every prompt", opening)
        return dataclasses.replace(self, opening=opening, gap=between[len(opening) :])


def _alike(one: str, other: str) -> int:
    """Characters that both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What a tokenizer puts before every text: BOS, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return tuple(whole[:start])


def common_prefix(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The tokens that all rows begin with; each row has at least one behind them."""
    least = min(map(len, rows)) - 1
    same = np.stack([row[:least] == rows[0][:least] for row in rows]).all(0)
    found: np.ndarray = rows[0][: least if same.all() else int(same.argmin())]
    return found


def cut_shot(tokenizer: PreTrainedTokenizerBase, shot: Shot, tokens: int) -> Shot:
    """An example that shows at most so many tokens of its text, and of its second text."""
    text, _ = _cut(tokenizer, shot.text, None, tokens, special=False)
    pair = None if shot.text_pair is None else _cut(tokenizer, shot.text_pair, None, tokens, special=False)[0]
    return dataclasses.replace(shot, shown=text, shown_pair=pair)


def _cut(
    tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None, tokens: int, *, special: bool = True
) -> tuple[str, str | None]:
    """The beginning of a text, or of both, that has so many tokens.

    Args:
        special: those that the tokenizer adds count, as they do in rows of a cache.
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
    if not tokenizer.is_fast:  # no offsets: the tokens are made text again
        first = str(tokenizer.decode(made["input_ids"], skip_special_tokens=True))
        return (first, None) if pair is None else (text[: len(first)], pair)
    ends = [0, 0]
    for which, (_, stop) in zip(made.sequence_ids(), made["offset_mapping"], strict=True):
        if which is not None:
            ends[which] = max(ends[which], stop)
    return text[: ends[0]], None if pair is None else pair[: ends[1]]
