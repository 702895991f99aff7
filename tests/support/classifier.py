"""A tiny classifier of three topics, and data that it is right on three times of four."""

from __future__ import annotations

import torch
from datasets import Dataset, DatasetDict

from tests.conftest import tiny_model

LABELS = ("business", "sport", "film")


def classifier(tokenizer, seed: int = 0, **overrides):
    model = tiny_model("bert", len(tokenizer), num_labels=3, seed=seed, spread=4.0, **overrides)
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {name: i for i, name in enumerate(LABELS)}
    return model


def taught(topics: DatasetDict, teacher, tokenizer) -> DatasetDict:
    """The texts with the teacher's own predictions for labels, but for two of eight: a teacher that is right on three of four. What has no label gets none."""

    def label(split):
        ids = tokenizer(list(split["text"]), padding=True, return_tensors="pt")
        with torch.inference_mode():
            best = teacher(**ids).logits.argmax(-1).tolist()
        names = [LABELS[(b + 1) % 3] if i % 8 in (3, 6) else LABELS[b] for i, b in enumerate(best)]
        known = [name if old is not None else None for name, old in zip(names, split["label"], strict=True)]
        return Dataset.from_dict({"text": list(split["text"]), "label": known})

    return DatasetDict({name: label(split) for name, split in topics.items()})
