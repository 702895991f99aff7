"""The Jinja template of a prompt: reading, checks, and rendering in a sandbox."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import MisuseError

#: The default template, for both chats and plain text.
DEFAULT = """\
Classify the text into one of these categories: {{ labels | join(', ') }}.

{% for shot in shots %}
Text: {{ shot.text }}
{% if shot.text_pair is not none %}
Second text: {{ shot.text_pair }}
{% endif %}
Category: {{ shot.label }}

{% endfor %}
Text: {{ text }}
{% if text_pair is not none %}
Second text: {{ text_pair }}
{% endif %}
Category:"""

#: The template is stored in the manifest, which limits the length of texts.
_MOST_CHARACTERS = 10_000
_EXAMPLE = "docs/llm-teachers.md has an example"


@dataclass(frozen=True, slots=True)
class Shown:
    """A labelled text, as passed to templates."""

    text: str
    text_pair: str | None
    label: str
    """The text of its label."""


@dataclass(frozen=True, slots=True)
class Template:
    """A template that renders text, labels and examples to a prompt."""

    name: str
    """Name for messages."""
    source: str
    compiled: jinja2.Template

    def render(self, text: str, text_pair: str | None, labels: Sequence[str], shots: Sequence[Shown]) -> str:
        """Render the prompt of one row.

        Raises:
            MisuseError: the template cannot be rendered.
        """
        try:
            return self.compiled.render(text=text, text_pair=text_pair, labels=list(labels), shots=list(shots))
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise MisuseError(
                f"{self.name}: cannot be rendered: {' '.join(str(error).split())}; a template reads text, text_pair, labels and shots ({_EXAMPLE})"
            ) from None

    @property
    def lines(self) -> tuple[str, ...]:
        """The lines of the source, as stored in the contract."""
        return tuple(self.source.split("\n"))


def read_template(given: str | None) -> Template:
    """Read a template from a file, or from a text with Jinja expressions; None: the built-in one.

    Raises:
        MisuseError: the file cannot be read, or is not a template.
    """
    if given is None:
        return _compiled("the built-in template", DEFAULT)
    if "{{" in given:
        return _compiled("prompt_template", given)
    name = f"--prompt-template {given}"
    try:
        source = Path(given).read_text(encoding="utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise MisuseError(f"{name}: cannot be read ({reason}); expected a Jinja template, or default") from None
    return _compiled(name, source)


def _compiled(name: str, source: str) -> Template:
    if len(source) > _MOST_CHARACTERS:
        raise MisuseError(
            f"{name}: expected at most {_MOST_CHARACTERS:,} characters, since the manifest holds the template, found {len(source):,}"
        )
    for number, line in enumerate(source.split("\n"), start=1):
        odd = next((c for c in line if unicodedata.category(c) == "Cc"), None)
        if odd is not None:
            raise MisuseError(
                f"{name}: line {number}: expected text without control characters, found {odd!r}; use spaces"
            )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False
    )
    try:
        return Template(name, source, environment.from_string(source))
    except jinja2.TemplateSyntaxError as error:
        raise MisuseError(f"{name}: line {error.lineno}: {error.message}") from None


def check_reads(template: Template, labels: Sequence[str], *, paired: bool, shots: bool) -> None:
    """Refuse a template that does not use all of its inputs.

    Args:
        paired: whether rows have a second text.
        shots: whether there are examples.

    Raises:
        MisuseError: the prompt does not depend on the text, on the second text or on the examples.
    """
    second = "b" if paired else None
    shown = [Shown("c", "d" if paired else None, labels[0])] if shots else []
    whole = template.render("a", second, labels, shown)
    others = {"text": template.render("aa", second, labels, shown)}
    if paired:
        others["text_pair"] = template.render("a", "bb", labels, shown)
    if shots:
        others["shots"] = template.render("a", second, labels, [])
    for name, other in others.items():
        if other == whole:
            raise MisuseError(f"{template.name}: does not read {name}; put {{{{ {name} }}}} in it ({_EXAMPLE})")
