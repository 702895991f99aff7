"""click options -> configuration -> one call of the public API; nothing else.

Heavy libraries are imported inside the commands, so that help answers at once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import config as cfg
from pipeline.errors import IntegrityError, MisuseError, PipelineError

if TYPE_CHECKING:
    from pipeline.cache import Cache
    from pipeline.records import EvaluationReport, TrainResult


#: Command -> what it does with its configuration; `run` calls the same.
FUNCTIONS: dict[str, Callable[[Any], None]] = {}


class _Terminated(BaseException):
    """SIGTERM, as an exception: temporary files are removed on the way out, as on Ctrl-C."""


class _Group(click.Group):
    """Turns a `PipelineError`, Ctrl-C or SIGTERM into one line on standard error and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except PipelineError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except (KeyboardInterrupt, _Terminated) as stop:
            code = 130 if isinstance(stop, KeyboardInterrupt) else 143  # 128 + the signal's number
            click.echo(
                "Error: interrupted; what was finished is kept: run the same command again to go on (train-student: with --resume)",
                err=True,
            )
            ctx.exit(code)
        finally:
            signal.signal(signal.SIGTERM, before)
            _leave_ranks()


def _terminate(_number: int, _frame: Any) -> None:
    raise _Terminated


def _leave_ranks() -> None:
    """Under torchrun, end the process group: a rank that just exits may be aborted by its threads (seen with gloo, in one run of three)."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="soft-label-pipeline")
def main() -> None:
    """Run a teacher once, cache its soft labels, train students from the cache.

    \b
    Example: every stage of the demo, in order
        softlabel run data/bbc/demo.yaml
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pipeline").setLevel(logging.INFO)


def _command(name: str, config_type: type, example: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """A command whose flags are the fields of its configuration; `--config` fills what no flag gives."""

    def decorate(function: Callable[[Any], None]) -> Callable[[Any], None]:
        def callback(config: str | None, **flags: Any) -> None:
            file = cfg.load_config(config) if config is not None else None
            given = {key: value for key, value in flags.items() if value is not None and value != ()}
            sections = (file.sections.get(name) if file is not None else None) or ({},)
            if len(sections) > 1 and "output" in given:
                raise MisuseError(
                    f"--output: {config} has {len(sections)} {name} sections, which would overwrite each other; name the output in each"
                )
            resolved_sections: list[Any] = [cfg.resolve(config_type, file, section, given) for section in sections]
            for resolved in resolved_sections:
                quiet_libraries()
                function(resolved)

        summary = (config_type.__doc__ or "").strip()
        command = click.Command(
            name, callback=callback, help=f"{summary}\n\n\b\nExample:\n    {example}", short_help=summary
        )
        command.params.append(
            click.Option(
                ["--config"],
                type=click.Path(dir_okay=False),
                help="YAML file with a section for this command; flags override it.",
            )
        )
        hints = {**typing.get_type_hints(cfg.DataConfig), **typing.get_type_hints(config_type)}
        command.params.extend(_option(field, hints[field.name]) for field in cfg.cli_fields(config_type))
        main.add_command(command)
        FUNCTIONS[name] = function
        return function

    return decorate


def _option(field: Any, hint: Any) -> click.Option:
    """One flag of one field. Its default stays in the dataclass; here it is only shown."""
    flag = "--" + field.name.replace("_", "-")
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    origin = typing.get_origin(hint)
    shown = (
        None
        if field.default in (None, ()) or isinstance(field.default, bool) or field.default is dataclasses.MISSING
        else str(field.default)
    )
    options: dict[str, Any] = {"help": field.metadata["help"], "default": None, "show_default": shown}
    if hint is bool:
        return click.Option(
            [f"{flag}/--no-{field.name.replace('_', '-')}"],
            **{**options, "show_default": "on" if field.default else "off"},
        )
    if origin is tuple:
        return click.Option([flag], type=arguments[0], multiple=True, **options)
    while typing.get_origin(hint) is not typing.Literal and arguments:
        hint, arguments = arguments[0], [a for a in typing.get_args(arguments[0]) if a is not type(None)]
    kind = click.Choice(arguments) if typing.get_origin(hint) is typing.Literal else hint
    return click.Option([flag], type=kind, **options)


def quiet_libraries() -> None:
    """Their bars and reports would mix with ours; errors still show."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


# --------------------------------------------------------------------------------------------------------- commands


@_command(
    "train-teacher",
    cfg.TrainTeacherConfig,
    "softlabel train-teacher --task sequence-classification --model bert-base-uncased --dataset data/bbc --output runs/teacher",
)
def _train_teacher(config: cfg.TrainTeacherConfig) -> None:
    from pipeline.models.teacher import run

    metrics = run(config)
    click.echo(f"teacher: {config.output}" + "".join(f"  {name} {value:.4f}" for name, value in metrics.items()))


@_command(
    "cache-logits",
    cfg.CacheLogitsConfig,
    "softlabel cache-logits --task sequence-classification --teacher runs/teacher --dataset data/bbc --output runs/cache",
)
def _cache_logits(config: cfg.CacheLogitsConfig) -> None:
    from pipeline.capture.run import run

    _echo_cache(run(config), config.output)


def _echo_cache(cache: Cache, output: str) -> None:
    from pipeline.cache.inspection import totals

    click.echo(f"cache: {output}  cache_id {cache.manifest.cache_id[:16]}")
    for split, total in totals(cache).items():
        click.echo(
            f"  {split}: {total['rows']:,} rows, {total['positions']:,} positions, {total['bytes']:,} bytes ({total['bytes_per_position']:,.1f} a position)"
        )
    if cache.manifest.bad_rows:
        click.echo(f"  {cache.manifest.bad_rows} rows set aside, listed in reports/bad-rows.tsv")


@_command(
    "estimate",
    cfg.EstimateConfig,
    "softlabel estimate --task causal-lm --teacher runs/teacher --dataset data/corpus --budget 100GB --write-config runs/capture.yaml",
)
def _estimate(config: cfg.EstimateConfig) -> None:
    from pipeline.cache.manifest import dump
    from pipeline.capture.estimate import run
    from pipeline.capture.estimate_table import format_estimate

    found = run(config)
    click.echo(dump(found) if config.json else format_estimate(found), nl=not config.json)


@_command(
    "init-student",
    cfg.InitStudentConfig,
    "softlabel init-student --teacher runs/teacher --num-layers 2 --hidden-size 128 --num-heads 2 --output runs/student-init",
)
def _init_student(config: cfg.InitStudentConfig) -> None:
    from pipeline.models.initialize import run

    click.echo(f"student: {run(config)}")


@_command(
    "train-student",
    cfg.TrainStudentConfig,
    "softlabel train-student --cache runs/cache --student runs/student-init --output runs/student",
)
def _train_student(config: cfg.TrainStudentConfig) -> None:
    from pipeline.training.run import run

    result = run(config)
    if os.environ.get("RANK", "0") == "0":  # under torchrun every rank comes here
        _echo_training(result)


def _echo_training(result: TrainResult) -> None:
    losses = [
        f"{name} loss {value:.4f}"
        for name, value in (("hard", result.hard_loss), ("soft", result.soft_loss))
        if value is not None
    ]
    click.echo(f"student: {result.output}  " + ", ".join([f"{result.steps} steps in {result.seconds:.0f} s", *losses]))


@_command(
    "evaluate",
    cfg.EvaluateConfig,
    "softlabel evaluate --cache runs/cache --student runs/student --student control=runs/control",
)
def _evaluate(config: cfg.EvaluateConfig) -> None:
    from pipeline.evaluation.run import run

    _echo_report(run(config), config)


def _echo_report(report: EvaluationReport, config: cfg.EvaluateConfig) -> None:
    from pipeline.cache.manifest import dump
    from pipeline.evaluation import format_table

    if config.json:
        click.echo(dump(report), nl=False)
        return
    click.echo(format_table(report))
    if config.output is not None:
        click.echo(f"\nkept in {Path(config.output, 'evaluation.json')}")


def _show_evaluation(config: cfg.EvaluateConfig) -> None:
    """The report that is kept already."""
    from pipeline.cache.manifest import parse
    from pipeline.records import EvaluationReport

    if config.output is not None:
        try:
            _echo_report(parse(EvaluationReport, Path(config.output, "evaluation.json")), config)
        except IntegrityError:  # a figure that was no number is null in it
            click.echo(f"kept in {Path(config.output, 'evaluation.json')}")


@_command("verify", cfg.VerifyConfig, "softlabel verify --cache runs/cache")
def _verify(config: cfg.VerifyConfig) -> None:
    from pipeline.cache import drop_broken, verify
    from pipeline.cache.manifest import dump

    found = verify(Path(config.cache), quick=config.quick)
    if config.json:
        click.echo(dump(found), nl=False)
    elif not found.problems:
        click.echo(
            f"{config.cache}: whole. {found.shards} shards, {found.rows:,} rows, {found.positions:,} positions, {found.bytes:,} bytes; cache_id {found.cache_id[:16]}"
        )
    for problem in found.problems:
        click.echo(f"Error: {problem}", err=True)
    if config.repair and found.broken:
        drop_broken(Path(config.cache), found)
        click.echo(f"dropped {', '.join(found.broken)}; run the same softlabel cache-logits again", err=True)
    if found.problems:
        click.get_current_context().exit(1)


@_command("inspect", cfg.InspectConfig, "softlabel inspect --cache runs/cache --rows 3")
def _inspect(config: cfg.InspectConfig) -> None:
    import json

    from pipeline.cache import Cache
    from pipeline.cache.inspection import describe, totals
    from pipeline.cache.manifest import dump

    cache = Cache.open(config.cache)
    if config.json:
        click.echo(json.dumps({"totals": totals(cache), "manifest": json.loads(dump(cache.manifest))}, indent=1))
        return
    for line in describe(cache, split=config.split, rows=config.rows, tokens=config.tokens, top=config.top):
        click.echo(line)


@_command(
    "import",
    cfg.ImportConfig,
    "softlabel import --input responses.jsonl --tokenizer Qwen/Qwen3-8B --teacher Qwen/Qwen3-8B --top-k 20 --output runs/cache",
)
def _import(config: cfg.ImportConfig) -> None:
    from pipeline.sharing.importers import run

    _echo_cache(run(config), config.output)


@main.command("run", short_help="Run every stage of a configuration file in order.")
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("stages", nargs=-1, type=click.Choice(list(cfg.STAGES)))
@click.option("--through", type=click.Choice(list(cfg.STAGES)), help="Stop after this stage.")
@click.option(
    "--overwrite", is_flag=True, help="Make a cache anew where the one that is there has other settings or inputs."
)
def _run(config: str, stages: tuple[str, ...], through: str | None, overwrite: bool) -> None:
    """Run every stage of a configuration file in order, or the STAGES named.

    A stage whose output was made from the same settings and inputs is skipped.

    \b
    Example:
        softlabel run data/bbc/demo.yaml --through cache-logits
    """
    from pipeline.workflow import run

    quiet_libraries()
    run(cfg.load_config(config), FUNCTIONS, stages, through, overwrite=overwrite, shown={"evaluate": _show_evaluation})


if __name__ == "__main__":
    main()
