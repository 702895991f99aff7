"""Choice of the number of tokens per forward pass.

It is measured once, before the first shard, and then stored in the plan.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import psutil
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.capture.forward import synchronize, teacher_logits
from pipeline.errors import ModelError
from pipeline.models import LoadedModel, pad_id
from pipeline.models.processors import plain_row
from pipeline.records import Tokenization, TokenizedExample
from pipeline.tasks import Task

logger = logging.getLogger(__name__)

#: A batch of twice the size must be faster by this factor.
_GAIN = 1.05
_REPEATS = 3
_MOST_TOKENS = 1 << 20
#: The float32 logits of a batch may take 1/8 of the free memory: two copies exist at a time, and
#: the model needs memory too.
_SHARE = 8


def fastest_batch_tokens(
    task: Task,
    teacher: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_classes: int,
    tokenization: Tokenization,
) -> int:
    """Return the fastest batch size in tokens, measured with rows of the greatest length.

    The size doubles until it is no longer faster or memory runs out. The float32 logits of a batch
    stay within an eighth of the free memory, because a CPU raises no error when memory runs out.

    Raises:
        ModelError: a single row does not fit.
    """
    length = tokenization.max_length
    best, best_speed = 0, 0.0
    tokens = max(length, 256 if task.reads != "images" else 8)
    while tokens <= _MOST_TOKENS and 4 * tokens * num_classes * _SHARE <= _free(teacher.model.device):
        rows = [_row(task, tokenizer, teacher.model, length)] * max(1, tokens // length)
        try:
            speed = len(rows) * length / _seconds(task, teacher, tokenizer, rows, num_classes)
        except torch.OutOfMemoryError:
            break
        if speed < _GAIN * best_speed:
            break
        best, best_speed = tokens, speed
        tokens *= 2
    if teacher.model.device.type == "cuda":
        torch.cuda.empty_cache()
    if not best:
        raise ModelError(
            f"{teacher.name}: out of memory with one row of {length} tokens; use a smaller --max-length or --dtype bfloat16"
        )
    logger.info("batches of %d tokens: %.0f tokens per second", best, best_speed)
    return best


def _row(task: Task, tokenizer: PreTrainedTokenizerBase, model: Any, length: int) -> TokenizedExample:
    if task.reads == "images":
        return plain_row(tokenizer)
    ids = np.full(length, pad_id(tokenizer, model), dtype=np.int32)
    supervised = task.default_positions(ids) if task.marks_positions else None
    types = np.zeros(length, dtype=np.int32) if "token_type_ids" in tokenizer.model_input_names else None
    return TokenizedExample(0, 0, ids, supervised, types)


def _seconds(
    task: Task, teacher: LoadedModel, tokenizer: PreTrainedTokenizerBase, rows: list[TokenizedExample], num_classes: int
) -> float:
    """Return the shortest duration of a few passes; the first one warms up."""
    found = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        synchronize(teacher_logits(task, teacher, tokenizer, rows, num_classes))
        found.append(time.perf_counter() - started)
    return min(found)


def _free(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)
