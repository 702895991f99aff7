"""Chats as text: what a chat template makes of the turns of a row, and which characters of it the assistant writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from pipeline.errors import BadRowError, SourceError
from pipeline.records import Example, Message

Span = tuple[int, int]

_UNMARKED = (
    "the tokenizer's chat template does not mark the assistant's tokens with {% generation %} ... {% endgeneration %}; "
    "give one that does with --chat-template FILE.jinja (the README shows how)"
)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template that marks what the assistant writes."""

    source: str
    turn_keys: frozenset[str]
    """Keys that it reads of a turn, as far as its text shows."""
    reads_tools: bool


def render_chat(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """The text of a chat, and the character spans that are to be learnt.

    Raises:
        SourceError: the chat template does not mark the assistant's tokens.
        BadRowError: the chat has keys that the template does not read, or the template refuses it.
    """
    source = tokenizer.chat_template
    if not isinstance(source, str):
        raise SourceError(_UNMARKED)
    turns = [_turn(message) for message in example.messages or ()]
    tools = None if example.tools is None else list(example.tools)
    try:
        template = _read_template(source)
    except jinja2.TemplateError as error:
        raise BadRowError(f"the chat template refuses it: {error}") from None
    unread = [
        (i, key) for i, turn in enumerate(turns) for key in turn.keys() - {"role", "content"} - template.turn_keys
    ]
    try:
        text, spans = _render(template, turns, tools, tokenizer)
        for number, key in sorted(unread):
            _check_read(template, turns, tools, text, tokenizer, number, key)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        # a template that wants turns to alternate, for one, or that expects text where a turn has none
        if unread:
            raise _unread(*min(unread)) from None
        raise BadRowError(f"the chat template refuses it: {error}") from None
    if tools and not template.reads_tools:
        raise BadRowError(
            "the chat template does not read the column tools; drop the column, or give a template that reads it with "
            "--chat-template FILE.jinja"
        )
    _check_arguments(turns, text)
    return text, _learnt(example.messages or (), spans)


def _turn(message: Message) -> dict[str, Any]:
    content = {} if message.content is None else {"content": message.content}
    return {"role": message.role, **content, **message.fields}


def _render(
    template: ChatTemplate, turns: list[dict[str, Any]], tools: list[Any] | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    special: dict[str, Any] = dict(tokenizer.special_tokens_map)
    rendered: Any = render_jinja_template(
        [turns], tools=tools, chat_template=template.source, return_assistant_tokens_mask=True, **special
    )
    return rendered[0][0], rendered[1][0]


def _check_read(
    template: ChatTemplate,
    turns: list[dict[str, Any]],
    tools: list[Any] | None,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    key: str,
) -> None:
    """A key that is not named in the template may still be read, with the whole turn: then the text changes without it."""
    without = [{name: value for name, value in turn.items() if name != key} for turn in turns]
    if _render(template, without, tools, tokenizer)[0] == text:
        raise _unread(number, key)


def _unread(number: int, key: str) -> BadRowError:
    return BadRowError(
        f"turn {number}: the chat template does not read the key {key!r}; drop it from the data, or give a template that "
        "reads it with --chat-template FILE.jinja"
    )


def _check_arguments(turns: list[dict[str, Any]], text: str) -> None:
    for number, turn in enumerate(turns):
        calls = turn.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function", call) if isinstance(call, dict) else {}
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str) and json.dumps(arguments, ensure_ascii=False) in text:
                raise BadRowError(
                    f"turn {number}: the chat template quotes the arguments of a tool call, which are JSON text already; "
                    "give them as an object"
                )


def _learnt(messages: tuple[Message, ...], spans: list[Span]) -> list[Span]:
    if all(message.learnt for message in messages):
        return spans
    turns = [message for message in messages if message.role == "assistant"]
    if len(turns) != len(spans):
        raise BadRowError(
            f"a turn has the weight 0, and the chat template marks {len(spans)} parts for {len(turns)} turns of the "
            "assistant: expected one each; give a template that marks every turn with --chat-template FILE.jinja"
        )
    return [span for span, message in zip(spans, turns, strict=True) if message.learnt]


# ------------------------------------------------------------------------------------ what a template's text says


class _Marks(Extension):
    """Parses `{% generation %}`, as the extension of transformers does."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("generation"), [], [], body).set_lineno(line)


@lru_cache(maxsize=16)
def _read_template(source: str) -> ChatTemplate:
    tree = jinja2.Environment(extensions=[_Marks, loopcontrols]).parse(source)
    if not any(map(_is_mark, tree.find_all(nodes.CallBlock))):
        raise SourceError(_UNMARKED)
    buffered = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)
    for outer in tree.find_all(buffered):
        if any(_is_mark(inner) for inner in outer.find_all(nodes.CallBlock)):
            raise SourceError(
                f"the chat template, line {outer.lineno}: {{% generation %}} stands inside a macro or another block, where "
                "the characters that it marks are not known; write it at the top level, with --chat-template FILE.jinja"
            )
    return ChatTemplate(source, frozenset(_turn_keys(tree)), "tools" in meta.find_undeclared_variables(tree))


def _is_mark(node: nodes.CallBlock) -> bool:
    call = node.call.node
    return isinstance(call, nodes.ExtensionAttribute) and call.identifier == _Marks.identifier


def _turn_keys(tree: nodes.Template) -> Iterator[str]:
    """String keys and attributes of `messages[...]` and of every variable that holds a turn."""
    names = {"messages"}
    bound = [
        *((node.target, node.iter) for node in tree.find_all(nodes.For)),
        *((node.target, node.node) for node in tree.find_all(nodes.Assign)),
    ]
    while True:
        found = {target.name for target, value in bound if isinstance(target, nodes.Name) and _is_turn(value, names)}
        if found <= names:
            break
        names |= found
    yield from (read.attr for read in tree.find_all(nodes.Getattr) if _is_turn(read.node, names))
    for read in tree.find_all(nodes.Getitem):
        if isinstance(read.arg, nodes.Const) and isinstance(read.arg.value, str) and _is_turn(read.node, names):
            yield read.arg.value
    for call in tree.find_all(nodes.Call):  # message.get("name")
        method = call.node
        if isinstance(method, nodes.Getattr) and method.attr == "get" and _is_turn(method.node, names):
            yield from (arg.value for arg in call.args[:1] if isinstance(arg, nodes.Const))


def _is_turn(node: nodes.Node, names: set[str]) -> bool:
    """Whether an expression is a turn or a list of turns: a variable of `names`, an element, a slice, a filter of it."""
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getitem) and not (isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)):
        return _is_turn(node.node, names)
    if isinstance(node, nodes.Filter):
        return node.node is not None and node.name != "tojson" and _is_turn(node.node, names)
    if isinstance(node, nodes.CondExpr):
        return any(_is_turn(each, names) for each in (node.expr1, node.expr2) if each is not None)
    return isinstance(node, nodes.Add) and (_is_turn(node.left, names) or _is_turn(node.right, names))
