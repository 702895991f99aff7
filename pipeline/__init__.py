"""Offline soft-label data sets: run a teacher once, cache what it believes, train students from the cache.

    import pipeline as softlabel

Exports are lazy: importing this package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.cache import Cache
    from pipeline.capture import cache_logits
    from pipeline.config import Loss
    from pipeline.evaluation import evaluate
    from pipeline.models.initialize import Shape, init_student
    from pipeline.records import Columns, Full, Sampled, TopK, TopP
    from pipeline.softlabels import encode
    from pipeline.training import DistillationTrainer, distillation_loss, train_student

_EXPORTS = {
    "Cache": "pipeline.cache",
    "Columns": "pipeline.records",
    "DistillationTrainer": "pipeline.training",
    "Full": "pipeline.records",
    "Loss": "pipeline.config",
    "Sampled": "pipeline.records",
    "Shape": "pipeline.models.initialize",
    "TopK": "pipeline.records",
    "TopP": "pipeline.records",
    "cache_logits": "pipeline.capture",
    "distillation_loss": "pipeline.training",
    "encode": "pipeline.softlabels",
    "evaluate": "pipeline.evaluation",
    "init_student": "pipeline.models.initialize",
    "train_student": "pipeline.training",
}

__all__ = [
    "Cache",
    "Columns",
    "DistillationTrainer",
    "Full",
    "Loss",
    "PipelineError",
    "Sampled",
    "Shape",
    "TopK",
    "TopP",
    "cache_logits",
    "distillation_loss",
    "encode",
    "evaluate",
    "init_student",
    "train_student",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
