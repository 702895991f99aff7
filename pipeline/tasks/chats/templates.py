"""Analyse a chat template's source, and render turns with it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from pipeline.errors import MisuseError, SourceError

Span = tuple[int, int]
Turn = Mapping[str, Any]

#: Errors that templates raise for turns that they do not accept, such as roles that do not
#: alternate or missing content.
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)

#: The argument that sets the date that `strftime_now` returns, and its default, which is the
#: fallback date in the template of Llama 3.1. Templates that mark the assistant's tokens use the
#: current date by default, for compatibility with existing caches.
CLOCK, DAY = "strftime_now", "2024-07-26"

#: `transformers` passes a turn's reasoning to templates under each of these names.
_REASONING = frozenset({"reasoning_content", "thinking", "reasoning"})


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The source of a chat template, and the names that it reads, found by static analysis."""

    source: str
    is_marked: bool
    """Whether it marks the text that the assistant writes with {% generation %}."""
    turn_keys: frozenset[str]
    """Keys of a turn that it reads."""
    variables: frozenset[str]
    """Undeclared variables that it reads: `messages`, `tools`, keyword arguments."""
    date_formats: frozenset[str] | None
    """Formats that it passes to `strftime_now`; None: one of them is not a constant."""

    @property
    def asks_the_date(self) -> bool:
        """Whether the rendered text depends on the date."""
        return self.date_formats is None or bool(self.date_formats)

    def reads(self, key: str) -> bool:
        """Return whether the template names a key of a turn."""
        return key in self.turn_keys or (key in _REASONING and bool(_REASONING & self.turn_keys))


@dataclass(frozen=True, slots=True)
class Renderer:
    """A template with its keyword arguments; call it to render turns as text."""

    template: ChatTemplate
    source: str
    """The template's source, with the date pinned if one is set."""
    arguments: Mapping[str, Any]

    def __call__(
        self, turns: Sequence[Turn], tools: Sequence[Any] | None = None, *, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """Return the text of some turns, and the character spans that the template marks.

        Args:
            prompt: add the generation prompt at the end.

        Raises:
            REFUSALS: the template does not accept the turns.
        """
        rendered: Any = render_jinja_template(
            [[dict(turn) for turn in turns]],
            tools=None if tools is None else list(tools),
            chat_template=self.source,
            return_assistant_tokens_mask=self.template.is_marked,
            add_generation_prompt=prompt,
            **self.arguments,
        )
        return rendered[0][0], rendered[1][0] if rendered[1] else []


def find_template(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None = None) -> ChatTemplate:
    """Return a tokenizer's chat template.

    If the tokenizer has several, `transformers` chooses one depending on `tools`.

    Raises:
        SourceError: there is none, it is not valid Jinja, or it marks text inside a macro or
            another block, where character positions are not known.
    """
    try:
        source = tokenizer.get_chat_template(tools=None if tools is None else list(tools))
    except ValueError:
        raise SourceError(
            "the tokenizer has no chat template; give one with --chat-template FILE.jinja (docs/chats.md shows how)"
        ) from None
    try:
        return read_template(source)
    except jinja2.TemplateError as error:
        raise SourceError(
            f"the chat template cannot be read: {error}; give another with --chat-template FILE"
        ) from None


def make_renderer(template: ChatTemplate, kwargs: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """Combine a template with keyword arguments (`KEY=JSON` each) and the special tokens.

    Raises:
        MisuseError: the template does not read an argument, or the date cannot be pinned.
    """
    special: dict[str, Any] = dict(tokenizer.special_tokens_map)
    arguments = dict(_parsed(tuple(kwargs)))
    day = arguments.pop(CLOCK, None if template.is_marked else DAY)
    unread = sorted(arguments.keys() - template.variables)
    if CLOCK in _parsed(tuple(kwargs)) and not template.asks_the_date:
        unread.append(CLOCK)
    if unread:
        known = sorted(template.variables - special.keys() - {"messages", "tools", "add_generation_prompt"})
        raise MisuseError(
            f"--chat-template-kwargs {unread[0]}: the chat template does not read it; it reads "
            f"{', '.join(known) or 'no argument'}"
        )
    pinned = day is not None and template.asks_the_date
    return Renderer(template, _pinned(template, str(day)) if pinned else template.source, {**special, **arguments})


def pinned_day(template: ChatTemplate, kwargs: Sequence[str]) -> tuple[str, ...]:
    """Add the date to the keyword arguments if the text of an unmarked template depends on it."""
    return tuple(kwargs) if template.is_marked else with_day(template, kwargs)


def with_day(template: ChatTemplate, kwargs: Sequence[str]) -> tuple[str, ...]:
    """Add the date to the keyword arguments if the template's text depends on it."""
    if not template.asks_the_date or CLOCK in _parsed(tuple(kwargs)):
        return tuple(kwargs)
    return tuple(sorted([*kwargs, f"{CLOCK}={json.dumps(DAY)}"]))


@lru_cache(maxsize=16)
def _parsed(kwargs: tuple[str, ...]) -> Mapping[str, Any]:
    pairs = (item.partition("=") for item in kwargs)
    return {key: json.loads(value) for key, _, value in pairs}


@lru_cache(maxsize=16)
def _pinned(template: ChatTemplate, day: str) -> str:
    """Return the source with a macro that replaces `strftime_now`."""
    try:
        now = datetime.datetime.fromisoformat(day)
    except ValueError:
        raise MisuseError(f"--chat-template-kwargs {CLOCK}: expected a day as {DAY}, found {day!r}") from None
    if template.date_formats is None:
        raise MisuseError(
            "the chat template asks for today's date in a format that is not a constant, so that rows would differ "
            "from day to day; give another with --chat-template FILE.jinja"
        )
    dates = {form: now.strftime(form) for form in sorted(template.date_formats)}
    macro = f"{{% macro {CLOCK}(format) %}}{{{{ {json.dumps(dates)}[format] }}}}{{% endmacro %}}\n"
    return macro + template.source  # Jinja drops the newline after a block


# ------------------------------------------------------------------ analysis of a template's source


class _Marks(Extension):
    """Jinja extension that parses `{% generation %}`, like the one of transformers."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("generation"), [], [], body).set_lineno(line)


@lru_cache(maxsize=16)
def read_template(source: str) -> ChatTemplate:
    """Analyse the source of a template.

    Raises:
        jinja2.TemplateError: the source is not valid Jinja.
        SourceError: `{% generation %}` is inside a macro or another block.
    """
    tree = jinja2.Environment(extensions=[_Marks, loopcontrols]).parse(source)
    is_marked = any(map(_is_mark, tree.find_all(nodes.CallBlock)))
    buffered = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)
    for outer in tree.find_all(buffered):
        if any(_is_mark(inner) for inner in outer.find_all(nodes.CallBlock)):
            raise SourceError(
                f"the chat template, line {outer.lineno}: {{% generation %}} stands inside a macro or another block, where "
                "the characters that it marks are not known; write it at the top level, with --chat-template FILE.jinja"
            )
    variables = frozenset(meta.find_undeclared_variables(tree))
    return ChatTemplate(source, is_marked, frozenset(_turn_keys(tree)), variables, _date_formats(tree))


def _is_mark(node: nodes.CallBlock) -> bool:
    call = node.call.node
    return isinstance(call, nodes.ExtensionAttribute) and call.identifier == _Marks.identifier


def _date_formats(tree: nodes.Template) -> frozenset[str] | None:
    calls = [c for c in tree.find_all(nodes.Call) if isinstance(c.node, nodes.Name) and c.node.name == CLOCK]
    formats = [arg.value if isinstance(arg, nodes.Const) else None for call in calls for arg in call.args]
    return None if None in formats or len(formats) != len(calls) else frozenset(map(str, formats))


def _turn_keys(tree: nodes.Template) -> Iterator[str]:
    """Yield the keys read from `messages[...]` and from every variable that holds a turn."""
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
    for test in tree.find_all(nodes.Compare):  # "thinking" in message
        if isinstance(test.expr, nodes.Const) and any(_is_turn(each.expr, names) for each in test.ops):
            yield str(test.expr.value)
    for call in tree.find_all(nodes.Call):  # message.get("name")
        method = call.node
        if isinstance(method, nodes.Getattr) and method.attr == "get" and _is_turn(method.node, names):
            yield from (arg.value for arg in call.args[:1] if isinstance(arg, nodes.Const))


def _is_turn(node: nodes.Node, names: set[str]) -> bool:
    """Return whether an expression is a turn or a list of turns.

    It is if it is a variable of `names`, or an element, slice, filter, choice or sum of such.
    """
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getitem) and not (isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)):
        return _is_turn(node.node, names)
    if isinstance(node, nodes.Filter):
        return node.node is not None and node.name != "tojson" and _is_turn(node.node, names)
    if isinstance(node, nodes.CondExpr):
        return any(_is_turn(each, names) for each in (node.expr1, node.expr2) if each is not None)
    return isinstance(node, nodes.Add) and (_is_turn(node.left, names) or _is_turn(node.right, names))
