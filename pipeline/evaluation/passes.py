"""One forward pass of a model over a split of a cache, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from pipeline.cache import Cache
from pipeline.cache.format.codec import num_tokens_of
from pipeline.cache.format.moments import scale_of
from pipeline.models import LoadedModel, pad_id, tokenizer_info
from pipeline.progress import Progress
from pipeline.records import RowBlock, StudentBatch
from pipeline.softlabels import served_temperature
from pipeline.tasks import Task
from pipeline.training.batches.collate import Collator, from_tensors, longest_row, of_student, to_tensors


def logits_by_batch(
    cache: Cache, task: Task, model: LoadedModel, split: str, batch_size: int, description: str
) -> Iterator[tuple[RowBlock, StudentBatch, Tensor]]:
    """Iterate over the rows of a split in order, with the model's logits.

    Args:
        batch_size: rows in a forward pass.
        description: label of the progress bar.

    Yields:
        Rows; their batch, whose target is the teacher at `served_temperature`; (N, V) float32
        logits of the N supervised positions.
    """
    num_classes = cache.manifest.contract.num_classes
    collator = collator_of(cache, task, model)
    dataset = cache.dataset(split)
    with Progress(description, len(dataset)) as progress:
        for rows in dataset.blocks(batch_size, names=collator.columns):
            tensors = send_to_device(to_tensors(collator.collate_block(rows)), model.model.device)
            batch = from_tensors(tensors, num_classes)
            with torch.inference_mode():
                logits = task.gather_logits(model.model, batch.inputs, batch.supervised)[:, :num_classes].float()
            yield rows, batch, logits
            progress.update(len(rows), tokens=num_tokens_of(rows))


def collator_of(cache: Cache, task: Task, model: LoadedModel) -> Collator:
    """The collator of the model's batches; retokenizes rows for a model with its own tokenizer."""
    contract = cache.manifest.contract
    own_tokenizer = tokenizer_info(model.tokenizer).sha256 != contract.tokenizer.sha256
    return Collator(
        task,
        model.tokenizer,
        served_temperature(contract.encoding),
        retokenize=of_student(contract, longest_row(task, contract, model)) if own_tokenizer else None,
        pad_id=pad_id(model.tokenizer, model.model),
        for_evaluation=True,
        vocabulary_map=cache.vocabulary_map,
        scale=scale_of(cache.manifest),
    )
