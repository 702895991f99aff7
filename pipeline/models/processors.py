"""What makes pixel values of images: a model's image processor, in the form that Pillow computes.

It stands wherever a tokenizer does for texts (`LoadedModel.tokenizer`, `Cache.tokenizer`), as
`processing_class` of `transformers.Trainer` is either.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedTokenizerBase

from pipeline.records import Image, TokenizedExample, TokenizerInfo
from pipeline.tasks import Task

#: The file that says how images become pixel values.
SETTINGS = "preprocessor_config.json"
#: Of the forms that a processor has, torchvision's and Pillow's, which differ in how they resize:
#: the pixels of a cache are the same on every machine.
FORM: dict[str, Any] = {"backend": "pil"}


def is_image_processor(processor: Any) -> bool:
    """Whether it makes pixel values, and no tokens."""
    return isinstance(processor, BaseImageProcessor)


def in_place_of_tokenizer(processor: Any) -> PreTrainedTokenizerBase:
    """An image processor, in the form that Pillow computes, where records name a tokenizer."""
    if getattr(processor, "backend", "pil") != "pil":
        with tempfile.TemporaryDirectory() as folder:
            processor.save_pretrained(folder)
            processor = AutoImageProcessor.from_pretrained(folder, **FORM)
    return cast(PreTrainedTokenizerBase, processor)


def plain_row(processor: Any) -> TokenizedExample:
    """A row of `plain_image`."""
    return TokenizedExample(0, 0, np.zeros(0, dtype=np.int32), image=plain_image(processor))


def check_images(task: Task, model: Any, processor: Any) -> None:
    """Let a model read an image of one colour.

    Raises:
        ModelError: it does not take what its image processor makes.
    """
    task.num_classes(model, processor)
    inputs, _ = task.collate([plain_row(processor)], 0, processor=processor)
    with torch.inference_mode():
        task.gather_logits(model, {name: tensor.to(model.device) for name, tensor in inputs.items()}, None)


def processor_info(processor: Any) -> TokenizerInfo:
    """The hash of all settings that are set, which decide the pixel values; no vocabulary."""
    settings = {name: value for name, value in json.loads(processor.to_json_string()).items() if value is not None}
    content = json.dumps(settings, sort_keys=True)
    return TokenizerInfo(hashlib.sha256(content.encode()).hexdigest(), None, 0, {})


def load_cached_processor(folder: Path) -> PreTrainedTokenizerBase:
    """The image processor in a directory, without code of its own."""
    return cast(
        PreTrainedTokenizerBase,
        AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **FORM),
    )


def plain_image(processor: Any) -> Image:
    """An image of one colour, of the size that the processor makes."""
    import PIL.Image

    height, width = image_size(processor) or (224, 224)
    found = io.BytesIO()
    PIL.Image.new("RGB", (width, height)).save(found, "PNG")
    return Image(found.getvalue())


def image_size(processor: Any) -> tuple[int, int] | None:
    """Height and width of the pixel values, where all images have the same."""
    size: Any = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = size or getattr(processor, "size", None)
    if isinstance(size, int):
        return size, size
    try:
        return int(size["height"]), int(size["width"])
    except (TypeError, KeyError):
        return None
