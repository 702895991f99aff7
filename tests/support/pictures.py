"""Small images of three colours, folders of them, and untrained image models."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow
from transformers import AutoConfig, AutoModelForImageClassification, set_seed
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

NAMES = ("blue", "green", "red")
#: Class -> its brightest channel.
CHANNELS = {"red": 0, "green": 1, "blue": 2}
SIDE = 8


def pixels(name: str, rng: np.random.Generator, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """Return (H, W, 3) uint8 noise, brighter in the channel of the class and on the left."""
    found = rng.integers(0, 120, (height, width, 3))
    found[..., CHANNELS[name]] += rng.integers(20, 120)
    found[:, : width // 2] += 15
    return found.clip(0, 255).astype(np.uint8)


def encode(array: np.ndarray, form: str = "PNG", **settings: Any) -> bytes:
    """Encode an array as an image file."""
    found = io.BytesIO()
    Pillow.fromarray(array).save(found, form, **settings)
    return found.getvalue()


def pictures(seed: int, count: int, *, unlabelled_every: int = 0) -> dict[str, list[Any]]:
    """Images as bytes with class names; every n-th label is left out."""
    rng = np.random.default_rng(seed)
    names = [NAMES[int(i)] for i in rng.integers(0, 3, count)]
    images = [{"bytes": encode(pixels(name, rng)), "path": f"{i:03}.png"} for i, name in enumerate(names)]
    known = [None if unlabelled_every and i % unlabelled_every else name for i, name in enumerate(names)]
    return {"image": images, "label": known}


def data_set(**rows: dict[str, list[Any]]) -> DatasetDict:
    """Return the rows as splits with an `Image` feature of `datasets`."""
    features = Features({"image": Image(), "label": Value("string")})
    return DatasetDict({split: Dataset.from_dict(found, features=features) for split, found in rows.items()})


def folders(path: Path, **rows: dict[str, list[Any]]) -> Path:
    """Write the layout `SPLIT/CLASS/FILE` without unlabelled rows."""
    for split, found in rows.items():
        for image, label in zip(found["image"], found["label"], strict=True):
            if label is not None:
                (path / split / label).mkdir(parents=True, exist_ok=True)
                (path / split / label / image["path"]).write_bytes(image["bytes"])
    return path


def untrained(path: Path, kind: str = "vit", *, seed: int = 0, side: int = SIDE, **settings: Any) -> Path:
    """Save a tiny random image model for `side` x `side` pixels, and return its directory."""
    shapes: dict[str, dict[str, Any]] = {
        "vit": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": side, "patch_size": 4,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
    }  # fmt: skip
    set_seed(seed)
    config = AutoConfig.for_model(kind, **{"num_labels": 3, **shapes[kind], **settings})
    AutoModelForImageClassification.from_config(config).save_pretrained(path)
    ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(path)
    return path
