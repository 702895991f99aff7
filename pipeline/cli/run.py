"""The command run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from pipeline import config as cfg
from pipeline.cli.commands import FUNCTIONS, OUTLINES, dry_run_option, main
from pipeline.cli.echo import echo_outline
from pipeline.cli.evaluation import show_evaluation
from pipeline.cli.report import show_report


@main.command("run", short_help="Run every stage of a configuration file in order.")
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("stages", nargs=-1, type=click.Choice(list(cfg.STAGES)))
@click.option(
    "--through", type=click.Choice(list(cfg.STAGES)), help="Stop after this stage; with rounds, after its last round."
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace caches and generated data with other settings or inputs too, and unfinished models. "
    "Finished models with other settings or inputs are replaced in any case, unless a cache was made with them.",
)
def _run(config: str, stages: tuple[str, ...], through: str | None, overwrite: bool, dry_run: bool) -> None:
    """Run every stage of a configuration file in order, or the STAGES named.

    A stage whose output was made from the same settings and inputs is skipped. With rounds: N in
    the file, the sections that hold {round} or {previous} are run N times: see docs/rounds.md.

    Example: every stage up to the cache

    \b
        softlabel run data/bbc/demo.yaml --through cache-logits
    """
    from pipeline.models.quiet import quiet_libraries
    from pipeline.workflow import outline, run

    quiet_libraries()
    shown: dict[str, Callable[[Any], None]] = {"evaluate": show_evaluation, "report": show_report}
    if dry_run:
        for name, lines in outline(cfg.load_config(config), OUTLINES, stages, through, overwrite=overwrite):
            echo_outline(name, lines)
        return
    run(cfg.load_config(config), FUNCTIONS, stages, through, overwrite=overwrite, shown=shown, tell=click.echo)


_run.params.append(dry_run_option())
