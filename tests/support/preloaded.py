"""Imports of the fork server of `tests.support.processes`.

It loads the libraries and every stage that a child may run.
"""

from __future__ import annotations

import gc
import importlib

MODULES = (
    "accelerate",
    "datasets",
    "hypothesis",
    "peft",
    "psutil",
    "pyarrow.parquet",
    "pytest",
    "s3fs",
    "torch",
    "torch.distributed",
    "torchmetrics",
    "transformers",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "pipeline.capture.run",
    "pipeline.cli",
    "pipeline.evaluation.run",
    "pipeline.generation.run",
    "pipeline.training.run",
    "pipeline.capture.engines.workers",
)

for name in MODULES:
    importlib.import_module(name)
gc.freeze()  # a garbage collection in a fork then neither visits nor copies their pages
