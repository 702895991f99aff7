"""Help of every command: usage, required options, options by group, 100 columns."""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Sequence
from typing import Any

import click

from pipeline.config.options import Group

#: Width of help texts and examples in columns.
WIDTH = 100
#: Maximum length of choices that are shown as the metavar; longer ones are listed in the text.
_MOST_CHOICES = 60
#: Titles of the groups of options, in order.
_TITLES = ("Required", *typing.get_args(Group), "Options")


class FieldOption(click.Option):
    """The flag of one field of a configuration.

    The default is set by the dataclass and only shown here.
    """

    def __init__(self, field: dataclasses.Field[Any], param_decls: Sequence[str], **settings: Any) -> None:
        text, _, later = field.metadata["help"].partition(" Default: ")
        kind = settings.get("type")
        if isinstance(kind, click.Choice) and len("|".join(map(str, kind.choices))) > _MOST_CHOICES:
            settings["metavar"], text = "NAME", f"{text} One of {', '.join(map(str, kind.choices))}."
        super().__init__(param_decls, help=text, default=None, **settings)
        self.group: Group = field.metadata["group"]
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        self.needed = not has_default
        """Whether the field must be set, by its flag or in the file of --config."""
        self.shown = f"({later.rstrip('.')})" if later else self._shown(field.default)

    def _shown(self, default: Any) -> str:
        """Format a default as click does."""
        if default in (None, (), dataclasses.MISSING):
            return ""
        if isinstance(default, bool):
            return (self.opts if default else self.secondary_opts)[0].lstrip("-")
        return ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)

    def get_help_extra(self, ctx: click.Context) -> Any:
        """The text in brackets after the help text."""
        extra: Any = super().get_help_extra(ctx)
        if self.shown:
            extra["default"] = self.shown
        if self.needed:
            extra["required"] = "required"
        return extra


def in_groups(params: Sequence[click.Parameter]) -> list[click.Parameter]:
    """Return the required options, then the others by group, then those of every command."""
    return sorted(params, key=lambda param: _TITLES.index(_title(param)))


def _title(param: click.Parameter) -> str:
    if not isinstance(param, FieldOption):
        return "Options"
    return "Required" if param.needed else param.group


def format_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Format the options of a command under the titles of their groups."""
    shown = [each for each in command.get_params(ctx) if not isinstance(each, click.Argument)]
    for title, params in itertools.groupby(shown, _title):
        records = [record for param in params if (record := param.get_help_record(ctx)) is not None]
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


def usage_pieces(command: click.Command, ctx: click.Context) -> list[str]:
    """The required options in a usage line, such as `--cache TEXT... --student TEXT`."""
    needed = [param for param in command.get_params(ctx) if isinstance(param, FieldOption) and param.needed]
    return [f"{param.opts[0]} {param.make_metavar(ctx)}{'...' * param.multiple}" for param in needed]


def example_lines(example: str) -> str:
    """Wrap a command at 100 columns with backslashes, so that it can be pasted."""
    lines: list[str] = []
    for piece in re.split(r" (?=--)", example):
        if lines and len(lines[-1]) + 1 + len(piece) <= WIDTH - len("      \\") - 4:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece if not lines else f"    {piece}")
    return " \\\n".join(f"    {line}" for line in lines)
