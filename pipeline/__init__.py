"""Offline knowledge distillation: cache a teacher's soft labels once, train students from them.

    import pipeline as softlabel

Exports are lazy: importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.cache import Cache
    from pipeline.capture import LabelledRow, cache_logits, write_cache
    from pipeline.cross_tokenizer.students import init_student
    from pipeline.evaluation import evaluate
    from pipeline.generation import generate
    from pipeline.models.initialize import Shape
    from pipeline.records import Columns, Full, Loss, Sampled, TopK, TopP, Views
    from pipeline.rounds import measure_written
    from pipeline.sharing import import_responses
    from pipeline.sharing.pull import pull
    from pipeline.sharing.push import push
    from pipeline.softlabels import encode, top_soft_labels
    from pipeline.training import DistillationTrainer, distillation_loss, train_student

_EXPORTS = {
    "Cache": "pipeline.cache",
    "Columns": "pipeline.records",
    "DistillationTrainer": "pipeline.training",
    "Full": "pipeline.records",
    "LabelledRow": "pipeline.capture",
    "Loss": "pipeline.records",
    "Sampled": "pipeline.records",
    "Shape": "pipeline.models.initialize",
    "TopK": "pipeline.records",
    "TopP": "pipeline.records",
    "Views": "pipeline.records",
    "cache_logits": "pipeline.capture",
    "distillation_loss": "pipeline.training",
    "encode": "pipeline.softlabels",
    "evaluate": "pipeline.evaluation",
    "generate": "pipeline.generation",
    "import_responses": "pipeline.sharing",
    "init_student": "pipeline.cross_tokenizer.students",
    "measure_written": "pipeline.rounds",
    "pull": "pipeline.sharing.pull",
    "push": "pipeline.sharing.push",
    "top_soft_labels": "pipeline.softlabels",
    "train_student": "pipeline.training",
    "write_cache": "pipeline.capture",
}

__all__ = [
    "Cache",
    "Columns",
    "DistillationTrainer",
    "Full",
    "LabelledRow",
    "Loss",
    "PipelineError",
    "Sampled",
    "Shape",
    "TopK",
    "TopP",
    "Views",
    "cache_logits",
    "distillation_loss",
    "encode",
    "evaluate",
    "generate",
    "import_responses",
    "init_student",
    "measure_written",
    "pull",
    "push",
    "top_soft_labels",
    "train_student",
    "write_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    found = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = found  # cached: later accesses do not call __getattr__
    return found
