"""A tiny classifier of three topics, and data on which its accuracy is three quarters."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict

from tests.conftest import WORDS, tiny_model

LABELS = ("business", "sport", "film")


def classifier(tokenizer, seed: int = 0, **overrides):
    model = tiny_model("bert", len(tokenizer), num_labels=3, seed=seed, spread=4.0, **overrides)
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {name: i for i, name in enumerate(LABELS)}
    return model


def taught(topics: DatasetDict, teacher, tokenizer) -> DatasetDict:
    """Label the texts with the teacher's predictions, except for two of every eight.

    The teacher's accuracy is therefore 3/4. Rows without a label stay unlabelled.
    """

    def label(split):
        ids = tokenizer(list(split["text"]), padding=True, return_tensors="pt")
        with torch.inference_mode():
            best = teacher(**ids).logits.argmax(-1).tolist()
        names = [LABELS[(b + 1) % 3] if i % 8 in (3, 6) else LABELS[b] for i, b in enumerate(best)]
        known = [name if old is not None else None for name, old in zip(names, split["label"], strict=True)]
        return Dataset.from_dict({"text": list(split["text"]), "label": known})

    return DatasetDict({name: label(split) for name, split in topics.items()})


def even(tokenizer) -> tuple[Any, list[str], list[int]]:
    """Return a classifier of sport, film and business with a bias that balances its predictions.

    Returns:
        The model, 160 texts, and its predicted classes for them.
    """
    model = tiny_model("bert", len(tokenizer), num_labels=3, spread=3.0)
    model.config.id2label = {0: "sport", 1: "film", 2: "business"}
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, 5)) for _ in range(160)]
    with torch.inference_mode():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    with torch.no_grad():
        model.classifier.bias -= logits.mean(0)
    return model, texts, (logits - logits.mean(0)).argmax(-1).tolist()


def swapped(classes: list[int]) -> list[int]:
    """Return the classes with the first two exchanged."""
    return [{0: 1, 1: 0}.get(c, c) for c in classes]
