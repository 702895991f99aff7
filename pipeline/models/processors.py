"""Image processors, which turn images into pixel values.

An image processor takes the place of the tokenizer (`LoadedModel.tokenizer`, `Cache.tokenizer`),
just as `processing_class` of `transformers.Trainer` is either. It always uses the Pillow backend.
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

#: The file with the settings of an image processor.
SETTINGS = "preprocessor_config.json"
#: The backend. The torchvision and Pillow backends resize differently; with a fixed one, the pixels
#: of a cache are the same on every machine.
FORM: dict[str, Any] = {"backend": "pil"}


def is_image_processor(processor: Any) -> bool:
    """Return whether a processor is an image processor, and not a tokenizer."""
    return isinstance(processor, BaseImageProcessor)


def in_place_of_tokenizer(processor: Any) -> PreTrainedTokenizerBase:
    """Return an image processor with the Pillow backend, typed as a tokenizer."""
    if getattr(processor, "backend", "pil") != "pil":
        with tempfile.TemporaryDirectory() as folder:
            processor.save_pretrained(folder)
            processor = AutoImageProcessor.from_pretrained(folder, **FORM)
    return cast(PreTrainedTokenizerBase, processor)


def plain_row(processor: Any) -> TokenizedExample:
    """Return a row with `plain_image`."""
    return TokenizedExample(0, 0, np.zeros(0, dtype=np.int32), image=plain_image(processor))


def check_images(task: Task, model: Any, processor: Any) -> None:
    """Run a model on an image of one colour.

    Raises:
        ModelError: the model does not accept the output of its image processor.
    """
    task.num_classes(model, processor)
    inputs, _ = task.collate([plain_row(processor)], 0, processor=processor)
    with torch.inference_mode():
        task.gather_logits(model, {name: tensor.to(model.device) for name, tensor in inputs.items()}, None)


def processor_info(processor: Any) -> TokenizerInfo:
    """Return the hash of all settings of an image processor, which determine the pixel values."""
    settings = {name: value for name, value in json.loads(processor.to_json_string()).items() if value is not None}
    content = json.dumps(settings, sort_keys=True)
    return TokenizerInfo(hashlib.sha256(content.encode()).hexdigest(), None, 0, {})


def load_cached_processor(folder: Path) -> PreTrainedTokenizerBase:
    """Load the image processor in a directory, without remote code."""
    return cast(
        PreTrainedTokenizerBase,
        AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **FORM),
    )


def plain_image(processor: Any) -> Image:
    """Return an image of one colour, in the size that the processor outputs."""
    import PIL.Image

    height, width = image_size(processor) or (224, 224)
    found = io.BytesIO()
    PIL.Image.new("RGB", (width, height)).save(found, "PNG")
    return Image(found.getvalue())


def image_size(processor: Any) -> tuple[int, int] | None:
    """Return height and width of the pixel values, or None if they depend on the image."""
    size: Any = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = size or getattr(processor, "size", None)
    if isinstance(size, int):
        return size, size
    try:
        return int(size["height"]), int(size["width"])
    except (TypeError, KeyError):
        return None
