"""Chats as text: what a chat template makes of the turns of a row, and which characters of it the assistant writes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.errors import BadRowError, MisuseError
from pipeline.records import Columns, Example, Message, Tokenization
from pipeline.tasks.chats.templates import (
    CLOCK,
    REFUSALS,
    Renderer,
    Span,
    Turn,
    find_template,
    make_renderer,
    pinned_day,
)
from pipeline.tasks.chats.turns import Rendered, replies, share_rows

#: `assistant_turns` of a contract, in words.
_ROWS = {
    "auto": "a chat is as few rows as have each turn in the context of inference",
    "all": "a chat is one row (--assistant-turns all)",
    "each": "each turn is a row (--assistant-turns each)",
    "last": "the last turn alone is learnt (--assistant-turns last)",
}
_OTHER = "give a template that reads it with --chat-template FILE.jinja"


def check_chat_settings(columns: Columns, settings: Tokenization) -> None:
    """Refuse settings that have no effect on inputs of other kinds.

    Raises:
        MisuseError: names the flag, and the inputs that it goes with.
    """
    chats = columns.messages is not None or columns.prompt is not None
    for flag, given in (
        ("--assistant-turns", settings.assistant_turns),
        ("--chat-template-kwargs", settings.chat_template_kwargs),
    ):
        if given and not chats:
            raise MisuseError(f"{flag} goes with chats: --messages-column, or --prompt-column with lists of turns")
    if settings.truncation_side is not None and not chats and columns.labels is None:
        raise MisuseError(
            "--truncation-side goes with chats, prompts and token ids with labels: texts are cut into pieces, and lose nothing"
        )


def settle(settings: Tokenization, tokenizer: PreTrainedTokenizerBase) -> Tokenization:
    """The settings of chats as the contract states them: with what the chat template decides.

    Where it marks the assistant's tokens, `assistant_turns` is left out, and where its text depends
    on the day, the day stands among its arguments.

    Raises:
        MisuseError: arguments that the template does not read.
        SourceError: the tokenizer has no chat template that can be read.
    """
    template = find_template(tokenizer)
    make_renderer(template, settings.chat_template_kwargs, tokenizer)
    turns = settings.assistant_turns or "auto"
    return dataclasses.replace(
        settings,
        assistant_turns=None if template.is_marked and turns in ("auto", "all") else turns,
        chat_template_kwargs=pinned_day(template, settings.chat_template_kwargs),
    )


def supervision(settings: Tokenization, tokenizer: PreTrainedTokenizerBase) -> str:
    """How the assistant's tokens are found with these settings of a contract, and why so."""
    template = find_template(tokenizer)
    if template.is_marked:
        parts = ["the chat template marks the assistant's tokens"]
    else:
        parts = [
            "the chat template does not mark the assistant's tokens: a turn is what it adds to the rendering before it "
            "with the generation prompt"
        ]
    if not template.is_marked and "add_generation_prompt" not in template.variables:
        parts.append("the template has no generation prompt, so that the header of a turn is learnt too")
    parts += [] if settings.assistant_turns is None else [_ROWS[settings.assistant_turns]]
    pinned = any(item.startswith(f"{CLOCK}=") for item in settings.chat_template_kwargs)
    if template.asks_the_date and not pinned:
        parts.append(f"rows differ from day to day, by the date in them (--chat-template-kwargs {CLOCK}=DAY pins it)")
    elif template.asks_the_date:
        day = next(item for item in settings.chat_template_kwargs if item.startswith(f"{CLOCK}="))
        parts.append(f"the day is {day}, whenever it is run (--chat-template-kwargs {CLOCK}=DAY)")
    return "; ".join(parts)


def render_chat(
    example: Example, tokenizer: PreTrainedTokenizerBase, settings: Tokenization, control: re.Pattern[str]
) -> list[Rendered]:
    """The rows of a chat as text with the character spans that are to be learnt; several where turns differ in context.

    Args:
        control: matches the tokens that templates are made of, as `control_tokens` gives it.

    Raises:
        SourceError: there is no chat template.
        MisuseError: an argument that the template does not read.
        BadRowError: the chat has keys that the template does not read, or the template refuses it.
    """
    messages, tools = example.messages or (), example.tools
    template = find_template(tokenizer, tools)
    render = make_renderer(template, settings.chat_template_kwargs, tokenizer)
    turns, text, spans = _rendered(messages, tools, render)
    mode = settings.assistant_turns or "auto"
    learnt = [i for i, message in enumerate(messages) if message.role == "assistant" and message.learnt]
    if mode == "last":
        learnt = learnt[-1:]
    if template.is_marked and mode in ("auto", "all"):
        return [Rendered(text, _learnt(messages, spans), len(messages), learnt)]
    if not learnt:
        roles = ", ".join(dict.fromkeys(message.role for message in messages))
        raise BadRowError(f"expected a turn of the assistant to learn from, found the roles {roles}")
    if template.is_marked:
        return [_marked(number, messages, turns, tools, render) for number in learnt]
    found = list(replies(learnt, turns, tools, render, control))
    if mode == "each":
        return [share_rows([reply])[0] for reply in found]
    rows = share_rows(found)
    if mode == "all" and len(rows) > 1:
        raise BadRowError(
            f"the chat template rewrites earlier turns, so that this chat is {len(rows)} rows; leave out --assistant-turns "
            "all, or set such rows aside with --on-bad-row skip"
        )
    return rows


def render_prompt(example: Example, tokenizer: PreTrainedTokenizerBase, kwargs: Sequence[str]) -> str:
    """The turns of a chat with the generation prompt: the text after which the assistant writes.

    Args:
        kwargs: `KEY=JSON` each, as a contract states them.

    Raises:
        SourceError: there is no chat template.
        MisuseError: an argument that the template does not read.
        BadRowError: the chat has keys that the template does not read, or the template refuses it.
    """
    messages, tools = example.messages or (), example.tools
    render = make_renderer(find_template(tokenizer, tools), kwargs, tokenizer)
    turns = _rendered(messages, tools, render)[0]
    try:
        return render(turns, tools, prompt=True)[0]
    except REFUSALS as error:
        raise BadRowError(f"the chat template refuses it with the generation prompt: {error}") from None


def _marked(
    number: int, messages: Sequence[Message], turns: Sequence[Turn], tools: Sequence[Any] | None, render: Renderer
) -> Rendered:
    """One turn of the assistant in its context, by the marks of the template."""
    try:
        text, spans = render(turns[: number + 1], tools)
    except REFUSALS as error:
        raise BadRowError(f"turn {number}: the chat template refuses the chat up to it: {error}") from None
    others = [dataclasses.replace(message, learnt=i == number) for i, message in enumerate(messages[: number + 1])]
    return Rendered(text, _learnt(others, spans), number + 1, [number])


def _learnt(messages: Sequence[Message], spans: list[Span]) -> list[Span]:
    turns = [message for message in messages if message.role == "assistant"]
    if all(message.learnt for message in turns):
        return spans
    if len(turns) != len(spans):
        raise BadRowError(
            f"a turn is context only, and the chat template marks {len(spans)} parts for {len(turns)} turns of the "
            "assistant: expected one each; give a template that marks every turn with --chat-template FILE.jinja"
        )
    return [span for span, message in zip(spans, turns, strict=True) if message.learnt]


# --------------------------------------------------------------------------------- the form that the template takes


def _rendered(
    messages: Sequence[Message], tools: Sequence[Any] | None, render: Renderer
) -> tuple[list[Turn], str, list[Span]]:
    """The turns in the first form that the template takes, and their rendering.

    All that they hold must have been read.
    """
    unread = [
        (i, key)
        for i, message in enumerate(messages)
        for key in message.fields
        if not render.template.reads(key) and not _is_reference(key, message.role)
    ]
    problem: BadRowError | None = None
    for turns in _forms(messages):
        try:
            text, spans = render(turns, tools)
        except REFUSALS as error:  # turns that must alternate, for one, or text expected where a turn has none
            refusal = _unread(*min(unread)) if unread else BadRowError(f"the chat template refuses it: {error}")
            problem = problem or refusal
            continue
        misprint = _misprinted(turns, text)
        if misprint is None:
            break
        problem = problem or misprint
    else:
        raise problem or BadRowError("the chat has no turns")
    for number, key in sorted(unread):
        _check_read(turns, tools, text, render, number, key)
    if tools and "tools" not in render.template.variables:
        raise BadRowError(f"the chat template does not read the column tools; drop the column, or {_OTHER}")
    return turns, text, spans


def _is_reference(key: str, role: str) -> bool:
    """Whether a key says which call a tool's turn answers, and no more: many templates go by the order of turns."""
    return key == "tool_call_id" or (key == "name" and role in ("tool", "function"))


def _forms(messages: Sequence[Message]) -> Iterator[list[Turn]]:
    """The forms that templates want turns in, in the order in which they are tried.

    The turns as they are given; then with the arguments of tool calls as objects, and as JSON text.
    Each with the content of turns that have none left out, null, and empty.
    """
    contents: list[dict[str, Any]] = [{}]
    if any(message.content is None for message in messages):
        contents += [{"content": None}, {"content": ""}]
    seen: list[list[Turn]] = []
    for convert in (_given, _decoded, _encoded):
        for content in contents:
            turns: list[Turn] = [_turn(message, convert(message.fields), content) for message in messages]
            if turns not in seen:
                seen.append(turns)
                yield turns


def _turn(message: Message, fields: Any, missing: dict[str, Any]) -> Turn:
    content = missing if message.content is None else {"content": message.content}
    return {"role": message.role, **content, **fields}


def _given(value: Any) -> Any:
    return value


def _decoded(value: Any) -> Any:
    """The same with the arguments of its tool calls as objects, where they are the JSON text of one."""
    return _with_arguments(value, lambda each: _object(each) if isinstance(each, str) else each)


def _encoded(value: Any) -> Any:
    return _with_arguments(value, lambda each: each if isinstance(each, str) else json.dumps(each, ensure_ascii=False))


def _with_arguments(fields: Any, convert: Any) -> Any:
    calls = fields.get("tool_calls")
    if not isinstance(calls, list):
        return fields
    return {**fields, "tool_calls": [_converted(call, convert) for call in calls]}


def _converted(call: Any, convert: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _converted(call["function"], convert)}
    return {**call, "arguments": convert(call["arguments"])} if "arguments" in call else call


def _object(text: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, dict) else text


def _misprinted(turns: Sequence[Turn], text: str) -> BadRowError | None:
    """Arguments of a tool call that the template writes as no model would read them, if there are any."""
    for number, turn in enumerate(turns):
        calls = turn.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function", call) if isinstance(call, dict) else {}
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str) and json.dumps(arguments, ensure_ascii=False) in text:
                return BadRowError(
                    f"turn {number}: the chat template quotes the arguments of a tool call, which are text; give them as an "
                    "object"
                )
            if isinstance(arguments, dict) and _as_python(arguments, turns, text):
                return BadRowError(
                    f"turn {number}: the chat template writes the arguments of a tool call as Python does; give them as "
                    "JSON text"
                )
    return None


def _as_python(arguments: dict[str, Any], turns: Sequence[Turn], text: str) -> bool:
    """Whether the text has them as Python prints them, which is not JSON, and no turn says so itself."""
    printed = str(arguments)
    try:
        json.loads(printed)
    except ValueError:
        return printed in text and not any(printed in str(turn.get("content")) for turn in turns)
    return False


def _check_read(
    turns: Sequence[Turn], tools: Sequence[Any] | None, text: str, render: Renderer, number: int, key: str
) -> None:
    """A key that is not named in the template may still be read, with the whole turn: then the text changes without it."""
    without = [{name: value for name, value in turn.items() if name != key} for turn in turns]
    try:
        changed = render(without, tools)[0] != text
    except REFUSALS:
        changed = True
    if not changed:
        raise _unread(number, key)


def _unread(number: int, key: str) -> BadRowError:
    return BadRowError(
        f"turn {number}: the chat template does not read the key {key!r}; drop it from the data, or {_OTHER}"
    )
