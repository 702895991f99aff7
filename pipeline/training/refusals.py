"""Settings of Trainer that mean nothing here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from pipeline.errors import MisuseError
from pipeline.training.settings import REFUSED, REFUSED_PARAMETERS


def refuse_unused(args: TrainingArguments, trainer_kwargs: Mapping[str, Any]) -> None:
    """Refuse settings of Trainer that mean nothing here, rather than ignore them.

    Raises:
        MisuseError: names the first, and what to do instead.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name, reason in REFUSED.items():
        value = getattr(args, name, None)
        value = getattr(value, "value", value)  # of an enumeration
        if value not in (None, False, 0, 0.0, "no", defaults.get(name)) and value != []:
            raise MisuseError(f"training: {name}: has no effect on distillation ({reason}); leave it out")
    for name, reason in REFUSED_PARAMETERS.items():
        if trainer_kwargs.get(name) is not None:
            raise MisuseError(f"{name}: {reason}; leave it out")
    if not getattr(args, "dataloader_in_order", True):
        raise MisuseError(
            f"training: dataloader_in_order: has no effect on distillation ({REFUSED['dataloader_in_order']}); leave it out"
        )
