"""Render a chat as text and find the character spans that the assistant writes."""

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

#: Descriptions of the values of `assistant_turns`.
_ROWS = {
    "auto": "a chat becomes as few rows as possible, with each turn in its context at inference",
    "all": "a chat is one row (--assistant-turns all)",
    "each": "each turn is a row (--assistant-turns each)",
    "last": "only the last turn is trained on (--assistant-turns last)",
}
_OTHER = "give a template that reads it with --chat-template FILE.jinja"


def check_chat_settings(columns: Columns, settings: Tokenization) -> None:
    """Refuse chat settings for inputs on which they have no effect.

    Raises:
        MisuseError: a setting has no effect; the message names its flag and the inputs it is for.
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
    """Return the chat settings that the contract records, adjusted to the chat template.

    `assistant_turns` is None if the template marks the assistant's tokens (unless it is "each" or
    "last"). If an unmarked template's text depends on the date, the date is added to its arguments.

    Raises:
        MisuseError: the template does not read one of the arguments.
        SourceError: the tokenizer has no chat template, or one that cannot be parsed.
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
    """Describe for the user how the assistant's tokens are found with these settings, and why."""
    template = find_template(tokenizer)
    if template.is_marked:
        parts = ["the chat template marks the assistant's tokens"]
    else:
        parts = [
            "the chat template does not mark the assistant's tokens: a turn is the text that it adds to the rendering before it "
            "with the generation prompt"
        ]
    if not template.is_marked and "add_generation_prompt" not in template.variables:
        parts.append("the template has no generation prompt, so that the header of a turn is trained on too")
    parts += [] if settings.assistant_turns is None else [_ROWS[settings.assistant_turns]]
    pinned = any(item.startswith(f"{CLOCK}=") for item in settings.chat_template_kwargs)
    if template.asks_the_date and not pinned:
        parts.append(f"rows contain the current date (--chat-template-kwargs {CLOCK}=DAY fixes it)")
    elif template.asks_the_date:
        day = next(item for item in settings.chat_template_kwargs if item.startswith(f"{CLOCK}="))
        parts.append(f"the date is always {day} (--chat-template-kwargs {CLOCK}=DAY sets another)")
    return "; ".join(parts)


def render_chat(
    example: Example, tokenizer: PreTrainedTokenizerBase, settings: Tokenization, control: re.Pattern[str]
) -> list[Rendered]:
    """Render a chat as one or more rows of text, with the character spans to train on.

    A chat becomes several rows if the template renders its assistant turns in different contexts.

    Args:
        control: the pattern from `control_tokens`; it matches the control tokens of templates.

    Raises:
        SourceError: the tokenizer has no chat template, or one that cannot be parsed.
        MisuseError: the template does not read one of the arguments.
        BadRowError: the chat has keys that the template does not read, the template raises an
            error for it, or the text of an assistant turn cannot be determined.
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
        raise BadRowError(f"expected a turn of the assistant to train on, found the roles {roles}")
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
    """Render the turns of a chat followed by the generation prompt.

    Args:
        kwargs: the template's arguments, `KEY=JSON` each, as in a contract.

    Raises:
        SourceError: the tokenizer has no chat template, or one that cannot be parsed.
        MisuseError: the template does not read one of the arguments.
        BadRowError: the chat has keys that the template does not read, or the template raises an
            error for it.
    """
    messages, tools = example.messages or (), example.tools
    render = make_renderer(find_template(tokenizer, tools), kwargs, tokenizer)
    turns = _rendered(messages, tools, render)[0]
    try:
        return render(turns, tools, prompt=True)[0]
    except REFUSALS as error:
        raise BadRowError(f"the chat template raises an error with the generation prompt: {error}") from None


def _marked(
    number: int, messages: Sequence[Message], turns: Sequence[Turn], tools: Sequence[Any] | None, render: Renderer
) -> Rendered:
    """Render one assistant turn in its context with a template that marks assistant tokens."""
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
            f"some turns are context only, and the chat template marks {len(spans)} parts for {len(turns)} turns of the "
            "assistant: expected one per turn; give a template that marks every turn with --chat-template FILE.jinja"
        )
    return [span for span, message in zip(spans, turns, strict=True) if message.learnt]


# ------------------------------------------------------------- the form that the template accepts


def _rendered(
    messages: Sequence[Message], tools: Sequence[Any] | None, render: Renderer
) -> tuple[list[Turn], str, list[Span]]:
    """Return the turns in the first form that the template accepts, the text and marked spans.

    Raises:
        BadRowError: the template accepts no form, or does not read all keys of the turns.
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
        except REFUSALS as error:  # for example, roles that must alternate, or missing content
            refusal = _unread(*min(unread)) if unread else BadRowError(f"the chat template raises an error: {error}")
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
    """Return whether a key only identifies the call that a tool turn answers.

    Many templates ignore such keys and rely on the order of turns.
    """
    return key == "tool_call_id" or (key == "name" and role in ("tool", "function"))


def _forms(messages: Sequence[Message]) -> Iterator[list[Turn]]:
    """Yield the turns in the different forms that templates expect, in the order to try them.

    The forms are: turns as given; arguments of tool calls as objects; arguments as JSON text. In
    each, missing content is left out, null, or empty.
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
    """Convert arguments of tool calls from JSON text to objects; other arguments stay."""
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
    """Return an error if the template writes tool-call arguments in a wrong form; else None.

    Wrong forms are JSON text quoted once more, and Python's `str` of a dict that is not JSON.
    """
    for number, turn in enumerate(turns):
        calls = turn.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function", call) if isinstance(call, dict) else {}
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str) and json.dumps(arguments, ensure_ascii=False) in text:
                return BadRowError(
                    f"turn {number}: the chat template quotes arguments of a tool call that are given as text; give them as an "
                    "object"
                )
            if isinstance(arguments, dict) and _as_python(arguments, turns, text):
                return BadRowError(
                    f"turn {number}: the chat template writes the arguments of a tool call as Python does; give them as "
                    "JSON text"
                )
    return None


def _as_python(arguments: dict[str, Any], turns: Sequence[Turn], text: str) -> bool:
    """Return whether the template wrote `str(arguments)`, which is not JSON.

    Text that a turn's own content has does not count.
    """
    printed = str(arguments)
    try:
        json.loads(printed)
    except ValueError:
        return printed in text and not any(printed in str(turn.get("content")) for turn in turns)
    return False


def _check_read(
    turns: Sequence[Turn], tools: Sequence[Any] | None, text: str, render: Renderer, number: int, key: str
) -> None:
    """Raise `BadRowError` if the rendering stays the same without a key.

    A template can read a key that it does not name, if it writes a whole turn.
    """
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
