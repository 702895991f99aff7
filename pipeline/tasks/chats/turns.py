"""Find the text of assistant turns for a chat template that does not mark it.

The text of turn i is found by comparing two renderings: the turns before it with the generation
prompt (the model's input at inference), and the turns up to and including it. The text that the
second adds is trained on, up to the token that ends the turn, where generation stops. Each turn has
its own context; turns whose contexts agree share a row.
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
#: A private-use character that replaces the words of a turn.
_BLANK = "\ue000"
_SPOKEN = ("content", "reasoning_content", "thinking", "reasoning")
#: Number of characters, if there is no control token, by which the end of a context is found in
#: another rendering.
_SHARED = 4
#: Maximum length of a control token, in characters.
_NEAR = 128


@dataclass(frozen=True, slots=True)
class Reply:
    """One assistant turn with the context that it has at inference."""

    number: int
    """Number of the turn in the chat."""
    text: str
    start: int
    """Where the text to train on starts, in characters."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a row, and the character spans to train on."""

    text: str
    spans: list[Span]
    num_turns: int
    """How many turns the row contains, from the first of the chat."""
    numbers: list[int]
    """Numbers of the turns to train on. If there are as many as spans, span i is of turn i."""


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern for the added tokens of a tokenizer, except words and white space."""
    names = [name for name in tokenizer.get_added_vocab() if name.strip() and not name.isalnum()]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def share_rows(replies: Sequence[Reply]) -> list[Rendered]:
    """Combine replies into as few rows as possible, with each reply in its own context.

    A reply shares the row of a later reply whose text begins with the text of the former.
    """
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
    """Yield the assistant turns with these numbers, in order.

    Raises:
        BadRowError: the template raises an error for a part of the chat, drops reasoning, or
            renders the turns so that the text of a turn cannot be determined.
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
        """Return a turn in its context, including the text that the template adds after it."""
        before, upto = self.turns[:number], self.turns[: number + 1]
        whole = self.text(upto, number)
        asked = self.attempt(before, prompt=True)
        if asked is None or (not number and not whole.startswith(asked)):
            # The assistant begins the chat: the header is the text that other words do not change.
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
            # The header of the turn differs from the generation prompt: it has an empty <think>,
            # for example.
            return self.whole_reasoning(Reply(number, whole, shared), asked)
        # The context differs: the template writes the system message only in the last turn, or
        # drops the reasoning of earlier turns, for example.
        header = "" if context is None else asked[len(context) :]
        words = self.blanked(number, whole)
        start = _behind(header or _last_piece(asked, self.control), whole, words) if words < len(whole) else None
        if start is None:
            raise BadRowError(
                f"turn {number}: the rendering with it does not continue the rendering before it, so that its text is "
                "not known; give a template that marks the assistant's tokens with {% generation %}, with --chat-template "
                "FILE.jinja"
            )
        return self.whole_reasoning(Reply(number, asked + whole[start:], len(asked)), asked)

    def blanked(self, number: int, whole: str) -> int:
        """Return where the words of a turn begin: where the rendering changes with other words."""
        other = self.attempt([*self.turns[:number], _blank(self.turns[number])])
        return len(whole) if other in (None, whole) else _alike(whole, str(other))

    def whole_reasoning(self, reply: Reply, asked: str) -> Reply:
        """Restore reasoning at the start of a turn's content if the template drops it.

        The resulting text is what the model writes at inference, after the generation prompt; the
        prompt may already contain the opening tag of the reasoning.

        Raises:
            BadRowError: the place of the reasoning in the rendering is not found.
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
                f"turn {reply.number}: the chat template drops its reasoning, which is trained on; give one that keeps it "
                "with --chat-template FILE.jinja, or set the turn's weight to 0"
            )
        kept = content[: len(content) - len(visible.lstrip())].lstrip()
        opened = re.search(rf"{_OPEN}(\s*)\Z", asked)
        if opened is not None:
            kept = kept.removeprefix(_OPEN).removeprefix(opened[1])
        return Reply(reply.number, asked + kept + added[at:], len(asked))

    def end(self, reply: Reply) -> int:
        """Return where generation stops: after the token that ends the turn.

        The template adds the text after it. Without such a token, the turn extends to the end of
        the text.
        """
        text = reply.text
        stops = _trailing_tokens(text, reply.start, self.control)
        if not stops:
            return len(text)
        turn = self.turns[reply.number]
        if len(stops) > 1 and (turn.get("content") or turn.get("tool_calls")):
            # A token that closes the whole chat, not the turn, disappears when another turn
            # follows.
            more = self.attempt([*self.turns[: reply.number + 1], {"role": "user", "content": "."}])
            goes_on = [stop for stop in stops if more is not None and more.startswith(text[:stop])]
            return goes_on[-1] if goes_on else stops[-1]
        return stops[-1]


def common_start(whole: str, other: str, control: re.Pattern[str]) -> int:
    """Return the length of the common prefix of two texts, cut back to a token or word boundary.

    The two may share the beginning of a word or control token by chance; that part is excluded.
    """
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
    """Return the length of the common prefix of two texts, in characters."""
    return next(
        (i for i, pair in enumerate(zip(whole, other, strict=False)) if pair[0] != pair[1]), min(len(whole), len(other))
    )


def _behind(piece: str, whole: str, limit: int) -> int | None:
    """Return the end of the last occurrence of `piece` before `limit`; None: there is none."""
    found = whole.rfind(piece, 0, limit)
    return None if found < 0 else found + len(piece)


def _last_piece(text: str, control: re.Pattern[str]) -> str:
    """Return the end of a text: from its last control token on, at least `_SHARED` characters."""
    last = max((found.start() for found in control.finditer(text, max(0, len(text) - _NEAR))), default=len(text))
    return text[min(last, max(0, len(text) - _SHARED)) :]


def _trailing_tokens(text: str, start: int, control: re.Pattern[str]) -> list[int]:
    """Return the ends of the control tokens at the end of a text; white space may separate them."""
    stops: list[int] = []
    for found in control.finditer(text, start):
        if stops and text[stops[-1] : found.start()].strip():
            stops.clear()
        stops.append(found.end())
    return stops if stops and not text[stops[-1] :].strip() else []


def _blank(turn: Turn) -> Turn:
    """Return a turn with its words and the names of the tools that it calls replaced."""
    words = {key: _BLANK for key in _SPOKEN if isinstance(turn.get(key), str)}
    calls = turn.get("tool_calls")
    return {**turn, **words, **({"tool_calls": [_renamed(call) for call in calls]} if isinstance(calls, list) else {})}


def _renamed(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    return {key: _BLANK if key == "name" else _renamed(item) for key, item in call.items()}
