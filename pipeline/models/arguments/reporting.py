"""The services that a training run's losses and metrics are reported to (`report_to`)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from pipeline.errors import ConfigError, MisuseError

#: Project name for services that group runs.
PROJECT = "soft-label-pipeline"
#: Service -> its package on PyPI.
_PACKAGES = {
    "azure_ml": "azureml-core",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "kubeflow": "kubeflow",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}


def reporting(output: str, asked: Sequence[str], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the TrainingArguments for reporting: services, run name and project.

    Args:
        output: its last part is the name of the run.
        asked: the values of `--report-to`.
        extra: the `training:` section, which may set the same fields.

    Raises:
        MisuseError: both the flag and the section set the services, or `none` or `all` is combined
            with others.
        ConfigError: a package is missing.
    """
    found: dict[str, Any] = {"run_name": Path(output).absolute().name, "project": PROJECT, "report_to": "none"}
    if not asked:
        return found
    flags = " ".join(f"--report-to {name}" for name in asked)
    if "report_to" in extra:
        raise MisuseError(f"{flags}: the training section has report_to: {extra['report_to']!r} too; keep one of them")
    names = list(dict.fromkeys(asked))
    if len(names) > 1 and {"none", "all"} & set(names):
        raise MisuseError(
            f"{flags}: none and all cannot be combined with other services; leave them out, or the others"
        )
    if names[0] not in ("none", "all"):
        check_installed(names, "--report-to")
    return {**found, "report_to": names[0] if names[0] in ("none", "all") else names}


def check_installed(names: Sequence[str], where: str) -> None:
    """Check that the services' packages are installed before a callback imports them.

    Raises:
        ConfigError: no such service, or its package is missing.
    """
    found = [*get_available_reporting_integrations(), "flyte"]  # transformers does not list flyte
    for name in names:
        if name not in ("none", "all", *_PACKAGES):
            raise ConfigError(f"{where} {name}: expected none, all, or some of {', '.join(_PACKAGES)}")
        if name in _PACKAGES and name not in found:
            raise ConfigError(f"{where} {name}: its package is missing: pip install {_PACKAGES[name]}, or leave it out")


def name_project(args: TrainingArguments) -> None:
    """Set the project for services that read it only from the environment."""
    if "wandb" in (args.report_to or ()):
        os.environ.setdefault("WANDB_PROJECT", args.project)


@contextlib.contextmanager
def own_run(args: TrainingArguments) -> Iterator[None]:
    """Give a training its own run in each service, and redirect their output to standard error.

    The wandb callback leaves its run open, so that the next student of the process would continue
    it. A run that was open before belongs to the caller and stays open.

    Raises:
        ConfigError: wandb refuses, or cannot be reached.
    """
    if not args.report_to:
        yield
        return
    before = _wandb_run()
    with contextlib.redirect_stdout(sys.stderr):
        failed = True
        try:
            yield
            failed = False
        except Exception as error:
            if type(error).__module__.startswith("wandb.errors"):
                said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
                raise ConfigError(
                    f"training: report_to: wandb: {said}; WANDB_MODE=offline keeps the run on this machine"
                ) from None
            raise
        finally:
            if before is None and _wandb_run() is not None:
                sys.modules["wandb"].finish(exit_code=int(failed))


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)
