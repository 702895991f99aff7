"""Read the turns and tools of chats: {role, content}, or {from, value} as in ShareGPT."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pipeline.errors import BadRowError
from pipeline.records import Message
from pipeline.sources.values import kind_of, read_text, without_nulls

_ROLES = {"human": "user", "gpt": "assistant"}
_SHAREGPT_ROLES = {**_ROLES, "observation": "tool"}
_CALLS = ("tool_calls", "function_call")


def read_messages(name: str, value: object) -> tuple[Message, ...]:
    """Read the turns of a chat.

    Keys with null or empty values are dropped; all others are passed to the chat template.

    Raises:
        BadRowError: there are no turns, or a turn has no role or content; the message begins with
            `name`.
    """
    if value is None or value == []:
        raise BadRowError(f"{name} is {'null' if value is None else 'empty'}")
    if not isinstance(value, list):
        raise BadRowError(f"{name}: expected a list of messages, found {kind_of(value)}")
    return tuple(_message(f"{name}[{number}]", turn) for number, turn in enumerate(value))


def read_tools(name: str, value: object) -> tuple[Mapping[str, object], ...] | None:
    """Read the tool descriptions of a chat, a list or its JSON text; None: there are none.

    Raises:
        BadRowError: the value is something else; the message begins with `name`.
    """
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRowError(f"{name}: expected a list of tools or its JSON text, found other text") from None
    if not value:
        return None
    tools = without_nulls(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRowError(f"{name}: expected a list of objects, one for each tool, found {kind_of(value)}")
    return tuple(tools)


def _message(where: str, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise BadRowError(f"{where}: expected {{role, content}}, found {kind_of(turn)}")
    present = without_nulls(turn)
    assert isinstance(present, dict)
    sharegpt = "role" not in present and "from" in present
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    role = read_text(f"{where}.{role_key}", present.pop(role_key, None))
    content = present.pop(content_key, None)
    learnt = _is_learnt(where, present)
    fields = {key: item for key, item in present.items() if item not in ("", [], {})}
    if sharegpt and role == "function_call":
        return Message("assistant", None, {**fields, "tool_calls": _calls(f"{where}.{content_key}", content)}, learnt)
    role = (_SHAREGPT_ROLES if sharegpt else _ROLES).get(role, role)
    if content is None and any(key in fields for key in _CALLS):
        return Message(role, None, fields, learnt)
    return Message(role, _content(f"{where}.{content_key}", content), fields, learnt)


def _content(name: str, value: object) -> str:
    """Return the text of a content, or of all parts of a list joined."""
    if not isinstance(value, list) or not value:
        return read_text(name, value, may_be_empty=True)
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        medium = _medium(part)
        if medium is not None:
            raise BadRowError(f"{name}[{number}]: expected text, found {medium}; chats are read as text alone")
        if kind != "text" or set(part) - {"type", "text"}:
            raise BadRowError(
                f"{name}[{number}]: expected {{type: text, text}}, found "
                f"{'the keys ' + ', '.join(part) + f' and the type {kind}' if isinstance(part, dict) else kind_of(part)}"
            )
        texts.append(read_text(f"{name}[{number}].text", part.get("text"), may_be_empty=True))
    return "".join(texts)


def _medium(part: object) -> str | None:
    """Return the medium of a part (image, audio or video) by its type or keys; None: no medium."""
    if not isinstance(part, dict):
        return None
    words = " ".join(str(word) for word in (part.get("type"), *part) if word is not None).lower()
    media = {"image": "an image", "audio": "audio", "video": "a video"}
    return next((found for word, found in media.items() if word in words), None)


def _is_learnt(where: str, turn: dict[str, object]) -> bool:
    """Remove `weight` and `train` from the turn, and return whether it is trained on."""
    learnt = True
    for key in ("weight", "train"):
        value = turn.pop(key, None)
        if value not in (None, 0, 1):
            raise BadRowError(f"{where}.{key}: expected 0 or 1, found {str(value)[:40]!r}")
        learnt = learnt and value != 0
    return learnt


def _calls(name: str, value: object) -> list[object]:
    """Parse the tool calls of a ShareGPT turn: JSON text of {name, arguments}, or of a list."""
    try:
        call = json.loads(read_text(name, value))
    except ValueError:
        call = None
    calls = call if isinstance(call, list) else [call]
    if not calls or not all(isinstance(each, dict) and "name" in each for each in calls):
        raise BadRowError(f"{name}: expected a tool call {{name, arguments}} as JSON text, found other text")
    return [{"type": "function", "function": each} for each in calls]
