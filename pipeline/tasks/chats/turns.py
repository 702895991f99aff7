"""The assistant's turns of a chat where the template does not mark them: what each adds to the rendering before it.

Of turn i there are two renderings: that of the turns before it with the generation prompt, which is
what a model is given at inference, and that of the turns up to and including it. What the second
one adds is to be learnt, up to the token that ends the turn, where generation stops. A turn has its
own context; turns whose contexts agree share a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.errors import BadRowError
from pipeline.tasks.chats.templates import REFUSALS, Renderer, Span, Turn

_OPEN, _CLOSE = "<think>", "</think>"
#: A character that no text has: what stands in for the words of a turn.
_BLANK = "\ue000"
_SPOKEN = ("content", "reasoning_content", "thinking", "reasoning")
#: Characters by which the end of a context is known in another rendering of it, where no control
#: token is there.
_SHARED = 4
#: A control token is no longer than this.
_NEAR = 128


@dataclass(frozen=True, slots=True)
class Reply:
    """One turn of the assistant with the context that it has at inference.

    All from `start` on is to be learnt.
    """

    number: int
    """Of the turn in the chat."""
    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a row, and the characters that are to be learnt."""

    text: str
    spans: list[Span]
    num_turns: int
    """The turns of the chat that it was rendered from, from the first on."""
    numbers: list[int]
    """The turns that are to be learnt. Where they are as many as the spans, a span is of each."""


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the added tokens of a tokenizer but for words and white space: what templates are made of."""
    names = [name for name in tokenizer.get_added_vocab() if name.strip() and not name.isalnum()]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def share_rows(replies: Sequence[Reply]) -> list[Rendered]:
    """As few rows as have every reply in its own context: one whose text begins a later reply's stands in its row."""
    rows: list[Rendered] = []
    for reply in reversed(replies):
        span = (reply.start, len(reply.text))
        host = next((row for row in rows if row.text.startswith(reply.text)), None)
        if host is None:
            rows.insert(0, Rendered(reply.text, [span], reply.number + 1, [reply.number]))
        else:
            host.spans.insert(0, span)
            host.numbers.insert(0, reply.number)
    return rows


def replies(
    numbers: Sequence[int],
    turns: Sequence[Turn],
    tools: Sequence[Any] | None,
    render: Renderer,
    control: re.Pattern[str],
) -> Iterator[Reply]:
    """The assistant's turns of these numbers, in order.

    Raises:
        BadRowError: the template refuses a part of the chat, or does not show what a turn adds.
    """
    chat = _Chat(turns, tools, render, control)
    for number in numbers:
        reply = chat.reply(number)
        yield replace(reply, text=reply.text[: chat.end(reply)])


@dataclass(frozen=True, slots=True)
class _Chat:
    turns: Sequence[Turn]
    tools: Sequence[Any] | None
    render: Renderer
    control: re.Pattern[str]

    def text(self, turns: Sequence[Turn], number: int, *, prompt: bool = False) -> str:
        try:
            return self.render(turns, self.tools, prompt=prompt)[0]
        except REFUSALS as error:
            raise BadRowError(f"turn {number}: the chat template refuses the chat up to it: {error}") from None

    def attempt(self, turns: Sequence[Turn], *, prompt: bool = False) -> str | None:
        try:
            return self.render(turns, self.tools, prompt=prompt)[0]
        except REFUSALS:
            return None

    def reply(self, number: int) -> Reply:
        """A turn in its context, with all that the template puts behind it."""
        before, upto = self.turns[:number], self.turns[: number + 1]
        whole = self.text(upto, number)
        asked = self.attempt(before, prompt=True)
        if asked is None or (not number and not whole.startswith(asked)):
            # The assistant begins the chat: its header is what stays when it says something else.
            return Reply(number, whole, self.blanked(number, whole))
        if whole.startswith(asked):
            return self.whole_reasoning(Reply(number, whole, len(asked)), asked)
        context = self.attempt(before)
        context = context if context is not None and asked.startswith(context) else None
        shared = common_start(whole, asked, self.control)
        if context is not None and shared <= len(context) <= _alike(whole, asked):
            shared = len(context)
        rest = self.control.sub("", asked[shared:])
        if (context is not None and shared >= len(context)) or not rest.strip():
            # The header of the turn is another one than the generation prompt's: an empty <think>,
            # for example.
            return self.whole_reasoning(Reply(number, whole, shared), asked)
        # The context is another one: a system message that stands in the last turn alone, reasoning
        # that goes with an answer.
        header = "" if context is None else asked[len(context) :]
        words = self.blanked(number, whole)
        start = _behind(header or _last_piece(asked, self.control), whole, words) if words < len(whole) else None
        if start is None:
            raise BadRowError(
                f"turn {number}: the rendering with it does not go on from the rendering before it, so that what it adds is "
                "not known; give a template that marks the assistant's tokens with {% generation %}, with --chat-template "
                "FILE.jinja"
            )
        return self.whole_reasoning(Reply(number, asked + whole[start:], len(asked)), asked)

    def blanked(self, number: int, whole: str) -> int:
        """Where the words of a turn begin: up to there its rendering is the same with other words."""
        other = self.attempt([*self.turns[:number], _blank(self.turns[number])])
        return len(whole) if other in (None, whole) else _alike(whole, str(other))

    def whole_reasoning(self, reply: Reply, asked: str) -> Reply:
        """The turn with the reasoning that its content begins with, where the template leaves it out of every turn.

        The text is what the model writes at inference: after the generation prompt, which may open
        the reasoning.
        """
        content = self.turns[reply.number].get("content")
        if not isinstance(content, str) or _CLOSE not in content:
            return reply
        head, _, visible = content.rpartition(_CLOSE)
        reasoning, added = head.rpartition(_OPEN)[2].strip(), reply.text[reply.start :]
        if not reasoning or reasoning in added:
            return reply
        at = added.find(visible.strip())
        if at < 0:
            raise BadRowError(
                f"turn {reply.number}: the chat template drops its reasoning, which is to be learnt; give one that keeps it "
                "with --chat-template FILE.jinja, or set the turn's weight to 0"
            )
        kept = content[: len(content) - len(visible.lstrip())].lstrip()
        opened = re.search(rf"{_OPEN}(\s*)\Z", asked)
        if opened is not None:
            kept = kept.removeprefix(_OPEN).removeprefix(opened[1])
        return Reply(reply.number, asked + kept + added[at:], len(asked))

    def end(self, reply: Reply) -> int:
        """Where generation stops: behind the token that ends the turn.

        What follows it is the template's.

        Without such a token all that the turn adds is its own.
        """
        text = reply.text
        stops = _trailing_tokens(text, reply.start, self.control)
        if not stops:
            return len(text)
        turn = self.turns[reply.number]
        if len(stops) > 1 and (turn.get("content") or turn.get("tool_calls")):
            # A token that closes the whole chat, and no turn, is not there when another turn
            # follows.
            more = self.attempt([*self.turns[: reply.number + 1], {"role": "user", "content": "."}])
            goes_on = [stop for stop in stops if more is not None and more.startswith(text[:stop])]
            return goes_on[-1] if goes_on else stops[-1]
        return stops[-1]


def common_start(whole: str, other: str, control: re.Pattern[str]) -> int:
    """How far two texts are alike, without the beginning of a word or control token that they share by chance."""
    alike = _alike(whole, other)
    stops, inside = {0}, False
    for text in (whole, other):
        for found in control.finditer(text, max(0, alike - _NEAR), alike + _NEAR):
            stops |= {found.start(), found.end()}
            inside |= found.start() < alike < found.end()
    near = (whole[alike : alike + 1], other[alike : alike + 1], whole[alike - 1 : alike])
    if not inside and (alike in stops or any(each == "" or each.isspace() for each in near)):
        return alike
    spaces = {i + 1 for i in range(max(0, alike - _NEAR), alike) if whole[i].isspace()}
    return max(stop for stop in stops | spaces if stop <= alike and not (inside and stop == alike))


def _alike(whole: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    return next(
        (i for i, pair in enumerate(zip(whole, other, strict=False)) if pair[0] != pair[1]), min(len(whole), len(other))
    )


def _behind(piece: str, whole: str, limit: int) -> int | None:
    """Where the last of such pieces before a place ends."""
    found = whole.rfind(piece, 0, limit)
    return None if found < 0 else found + len(piece)


def _last_piece(text: str, control: re.Pattern[str]) -> str:
    """The end of a text by which it is known in another one: its last control token, or a few characters."""
    last = max((found.start() for found in control.finditer(text, max(0, len(text) - _NEAR))), default=len(text))
    return text[min(last, max(0, len(text) - _SHARED)) :]


def _trailing_tokens(text: str, start: int, control: re.Pattern[str]) -> list[int]:
    """Where the control tokens end that nothing but white space follows."""
    stops: list[int] = []
    for found in control.finditer(text, start):
        if stops and text[stops[-1] : found.start()].strip():
            stops.clear()
        stops.append(found.end())
    return stops if stops and not text[stops[-1] :].strip() else []


def _blank(turn: Turn) -> Turn:
    """A turn with other words, and another name for each tool that it calls."""
    words = {key: _BLANK for key in _SPOKEN if isinstance(turn.get(key), str)}
    calls = turn.get("tool_calls")
    return {**turn, **words, **({"tool_calls": [_renamed(call) for call in calls]} if isinstance(calls, list) else {})}


def _renamed(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    return {key: _BLANK if key == "name" else _renamed(item) for key, item in call.items()}
