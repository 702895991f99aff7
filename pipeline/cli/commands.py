"""Build commands from configurations: one flag per field, errors as one line and an exit code.

Heavy libraries are imported inside the commands, so that `--help` is fast.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
import typing
from collections.abc import Callable
from typing import Any

import click

from pipeline import config as cfg
from pipeline.cli.echo import echo_outline
from pipeline.cli.help import WIDTH, FieldOption, example_lines, format_options, in_groups, usage_pieces
from pipeline.config.file import PATHS
from pipeline.errors import MisuseError, PipelineError
from pipeline.records import Outline
from pipeline.verbosity import LEVELS, at_level, chosen_level

#: Command -> function that runs it with its configuration; also used by `run`.
FUNCTIONS: dict[str, Callable[[Any], None]] = {}
#: Command -> function that describes what it would do, for `--dry-run`.
OUTLINES: dict[str, Callable[[Any], Outline]] = {}


_EPILOG = """\b
softlabel help COMMAND       the same as softlabel COMMAND --help
Flags may stand in a YAML file as well: --config FILE.yaml, a section for each command.

\b
Completion of commands, flags and paths:
    bash  eval "$(_SOFTLABEL_COMPLETE=bash_source softlabel)"               in ~/.bashrc
    zsh   eval "$(_SOFTLABEL_COMPLETE=zsh_source softlabel)"                in ~/.zshrc
    fish  _SOFTLABEL_COMPLETE=fish_source softlabel > ~/.config/fish/completions/softlabel.fish
"""


def _verbosity_options() -> list[click.Option]:
    """Flags of the group and of every command; they do not affect outputs, so are no settings."""
    return [
        click.Option(["--quiet"], is_flag=True, help="Print results and warnings only, no progress."),
        click.Option(["--verbose"], is_flag=True, help="Print all log messages, those of libraries too."),
        click.Option(
            ["--log-level"],
            type=click.Choice(LEVELS),
            help="Lowest log level on standard error: info, warning with --quiet, debug with --verbose.",
        ),
    ]


class _Terminated(BaseException):
    """SIGTERM as an exception, so that temporary files are removed as on Ctrl-C."""


_VERBOSITY = _verbosity_options()


class _Command(click.Command):
    """Command that rejects a repeated single-valued option; click would use the last value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse arguments, and check that no single-valued option is repeated."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for param in given if not ctx.resilient_parsing else ():
            once = isinstance(param, click.Option) and param.expose_value and not (param.multiple or param.count)
            if once and given.count(param) > 1:
                raise MisuseError(
                    f"{param.opts[0]}: takes one value, and is given {given.count(param)} times; keep one"
                )
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Parameters in the order of the help, with those of every command last."""
        own = super().get_params(ctx)
        return [*in_groups(own[:-1]), *_VERBOSITY, *own[-1:]]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command at the log level set by the flags of the command and of the group."""
        given = [{option.name: ctx.params.pop(str(option.name), None) for option in _VERBOSITY}]
        given += [ctx.parent.params] if ctx.parent is not None else []
        quiet, verbose = (any(params.get(name) for params in given) for name in ("quiet", "verbose"))
        names = tuple(name for params in given if (name := params.get("log_level")) is not None)
        with at_level(chosen_level(quiet=quiet, verbose=verbose, names=names)):
            return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Usage with the required options first."""
        return [*usage_pieces(self, ctx), *super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Format the options by group."""
        format_options(self, ctx, formatter)


class _Group(click.Group):
    """Group that reports `PipelineError`, Ctrl-C and SIGTERM by one line and an exit code."""

    command_class = _Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands in the order of the pipeline."""
        order = ["init", *cfg.SECTIONS]
        return sorted(self.commands, key=lambda name: order.index(name) if name in order else len(order))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse arguments; `help COMMAND` is the same as `COMMAND --help`."""
        return super().parse_args(ctx, [*args[1:2], "--help"] if args[:1] == ["help"] else args)

    def invoke(self, ctx: click.Context) -> Any:
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except PipelineError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except RuntimeError as error:
            torch = sys.modules.get("torch")
            if torch is None or not isinstance(error, torch.OutOfMemoryError):
                raise
            click.echo(
                f"Error: out of memory: {str(error).strip().splitlines()[0]}; use a smaller --batch-size or --batch-tokens "
                "(gradient_accumulation_steps keeps the size of a training batch); finished work is kept",
                err=True,
            )
            ctx.exit(1)
        except (KeyboardInterrupt, _Terminated) as stop:
            code = 130 if isinstance(stop, KeyboardInterrupt) else 143  # 128 + the signal's number
            click.echo(
                "Error: interrupted; what was finished is kept: run the same command again to go on",
                err=True,
            )
            ctx.exit(code)
        finally:
            signal.signal(signal.SIGTERM, before)
            _leave_ranks()


def _terminate(_number: int, _frame: Any) -> None:
    raise _Terminated


def _leave_ranks() -> None:
    """Destroy the process group of torchrun; with gloo, ranks that just exit sometimes abort."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
    epilog=_EPILOG,
)
@click.version_option(None, "-V", "--version", package_name="soft-label-pipeline")
def main(**_verbosity: Any) -> None:
    """Run a teacher once, cache its soft labels, train students from the cache.

    Example: a file for a data set of your own, and every stage in it

    \b
        softlabel init --dataset tickets.csv --output distil.yaml
        softlabel run distil.yaml
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pipeline").setLevel(logging.INFO)


main.params.extend(_verbosity_options())


def command(
    name: str, config_type: type, example: str, *, outline: Callable[[Any], Outline] | None = None
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Decorator that makes a command with one flag per field of its configuration.

    `--config` sets the fields that are not given by flags.

    Args:
        name: name of the command.
        config_type: dataclass of the configuration; its docstring is the summary in the help.
        example: command line shown in the help.
        outline: function that checks the inputs and describes what the command would do; adds
            `--dry-run`.
    """

    def decorate(function: Callable[[Any], None]) -> Callable[[Any], None]:
        def callback(config: str | None = None, dry_run: bool = False, **flags: Any) -> None:
            file = cfg.load_config(config) if config is not None else None
            given = {key: value for key, value in flags.items() if value is not None and value != ()}
            sections = (cfg.sections_for(file, name) if file is not None else None) or ({},)
            if len(sections) > 1 and "output" in given:
                raise MisuseError(
                    f"--output: {config} has {len(sections)} {name} sections, which would overwrite each other; name the output in each"
                )
            resolved_sections: list[Any] = [cfg.resolve(config_type, file, section, given) for section in sections]
            from pipeline.models.quiet import quiet_libraries

            for resolved in resolved_sections:
                quiet_libraries()
                if dry_run and outline is not None:
                    echo_outline(name, outline(resolved))
                else:
                    function(resolved)

        summary = (config_type.__doc__ or "").strip()
        command = _Command(
            name, callback=callback, help=f"{summary}\n\nExample:\n\n\b\n{example_lines(example)}", short_help=summary
        )
        if name in cfg.SECTIONS:
            command.params.append(
                click.Option(
                    ["--config"],
                    type=click.Path(dir_okay=False),
                    help="YAML file with a section for this command; flags override it.",
                )
            )
        if outline is not None:
            command.params.append(dry_run_option())
            OUTLINES[name] = outline
        hints = {**typing.get_type_hints(cfg.DataConfig), **typing.get_type_hints(config_type)}
        command.params.extend(_option(field, hints[field.name]) for field in cfg.cli_fields(config_type))
        main.add_command(command)
        FUNCTIONS[name] = function
        return function

    return decorate


def dry_run_option() -> click.Option:
    """The flag `--dry-run` of long-running commands."""
    return click.Option(
        ["--dry-run"],
        is_flag=True,
        help="Check settings, files and models, print what would be read and written, and stop.",
    )


def _option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    """The click option of one field."""
    flag = "--" + cfg.flag_name(field.name)
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    options: dict[str, Any] = {}
    if field.name in PATHS:
        options["shell_complete"] = click.Path().shell_complete
    if hint is bool or hint == bool | None:
        return FieldOption(field, [field.name, f"{flag}/--no-{cfg.flag_name(field.name)}"])
    if typing.get_origin(hint) is tuple:
        literal = typing.get_origin(arguments[0]) is typing.Literal
        kind = click.Choice(typing.get_args(arguments[0])) if literal else arguments[0]
        return FieldOption(field, [field.name, flag], type=kind, multiple=True, **options)
    while typing.get_origin(hint) is not typing.Literal and arguments:
        hint, arguments = arguments[0], [a for a in typing.get_args(arguments[0]) if a is not type(None)]
    kind = click.Choice(arguments) if typing.get_origin(hint) is typing.Literal else hint
    return FieldOption(field, [field.name, flag], type=kind, **options)
