"""Encoded images -> pixel values: decoded by Pillow, cut to the part that is seen, and made a tensor by the image processor."""

from __future__ import annotations

import base64
import io
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import BadRowError, ModelError
from pipeline.records import Image, Ragged

#: Files that are decoded. Pillow reads others too, some by starting programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
#: Images, or parts of a batch, that are decoded at a time, for each thread.
_AHEAD = 4
#: Bytes of images, on average, that are decoded without other threads: threads that wait for each
#: other take longer.
_SMALL = 16 << 10

Item = TypeVar("Item")
Found = TypeVar("Found")


def decode(data: bytes) -> Any:
    """A `PIL.Image.Image` in RGB, turned as its orientation says; of an animation the first frame.

    Raises:
        BadRowError: no image in one of `FORMATS`, a damaged one, or one of so many pixels that
            Pillow refuses it.
    """
    import PIL.Image
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which are allowed up to twice the size
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                turned = ImageOps.exif_transpose(image)
                return _in_bytes(turned).convert("RGB")
    except BadRowError:
        raise
    except Exception as error:  # each decoder has errors of its own
        why = "no image in a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadRowError(f"cannot be decoded: {' '.join(why.split())[:200]}") from None


def _in_bytes(image: Any) -> Any:
    """An image of 8 bits a channel; of 16 bits the upper half of each. `convert` would clip them.

    Raises:
        BadRowError: pixels of 32 bits, or floats, whose range is not known.
    """
    import PIL.Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] < 1 << 16):
        return PIL.Image.fromarray((np.asarray(image).astype(np.int64).clip(0) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadRowError(
            f"pixels of the mode {image.mode}, whose range is not known; save it with 8 or 16 bits a channel"
        )
    return image


def pixel_values(images: Sequence[Image], views: Ragged | None, processor: Any) -> Tensor:
    """(B, C, H, W) float32: what a model is given.

    Args:
        images: (B,).
        views: the part of each that is seen, as `TokenizedExample.view`; None: all of each.
        processor: a `transformers` image processor, which resizes and normalises a part as if it
            were an image of its own.

    Raises:
        BadRowError: an image that cannot be decoded, or a part that lies outside of it; begins with
            its name.
        ModelError: the processor makes images of several sizes.
    """
    parts = [None] * len(images) if views is None else np.split(views.values, views.offsets[1:-1])

    def one(image: Image, view: Any) -> Tensor:
        try:
            seen = cut(decode(image.data), view)
        except BadRowError as error:
            raise BadRowError(f"{image.path or 'an image'}: {error}") from None
        found: Tensor = processor(images=seen, return_tensors="pt")["pixel_values"]
        return found

    def some(pairs: Sequence[tuple[Image, Any]]) -> list[Tensor]:
        # One by one, so that no image depends on the others of its batch.
        return [one(image, view) for image, view in pairs]

    pairs = list(zip(images, parts, strict=True))
    if sum(len(image.data) for image in images) < _SMALL * len(images):
        return _joined(some(pairs))
    size = math.ceil(len(pairs) / _threads())
    chunks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return _joined([pixels for found in in_threads(some, chunks) for pixels in found])


def _joined(pixels: Sequence[Tensor]) -> Tensor:
    sizes = sorted({(each.shape[-2], each.shape[-1]) for each in pixels})
    if len(sizes) > 1:
        (h, w), (height, width) = sizes[0], sizes[-1]
        raise ModelError(
            f"the image processor makes images of several sizes, {h} x {w} and {height} x {width} pixels; let it resize or crop all to one size, in preprocessor_config.json"
        )
    return torch.cat(list(pixels))


def cut(image: Any, view: np.ndarray | None) -> Any:
    """The part of a `PIL.Image.Image` that is seen, mirrored where the view says so."""
    import PIL.Image

    if view is None or not len(view):
        return image
    left, top, width, height, mirrored = (int(number) for number in view)
    if left + width > image.width or top + height > image.height:
        raise BadRowError(
            f"expected a part of {image.width} x {image.height} pixels, found {width} x {height} at {left}, {top}"
        )
    part = image.crop((left, top, left + width, top + height))
    return part.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else part


def thumbnail(data: bytes, view: np.ndarray | None, side: int = 128) -> str:
    """A `data:` URI of a small PNG of what is seen of an image, at most `side` pixels wide and high."""
    try:
        small = cut(decode(data), view)
    except BadRowError:
        return ""
    small.thumbnail((side, side))
    found = io.BytesIO()
    small.save(found, "PNG")
    return f"data:image/png;base64,{base64.b64encode(found.getvalue()).decode()}"


def in_threads(function: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
    """`map` in several threads, a few items ahead: decoding and resizing leave Python's lock."""
    pool, waiting = _pool(os.getpid()), iter(items)
    ahead = [pool.submit(function, item) for item in itertools.islice(waiting, _AHEAD * _threads())]
    while ahead:
        yield ahead.pop(0).result()
        ahead += [pool.submit(function, item) for item in itertools.islice(waiting, 1)]


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """One for each process: threads do not survive a fork, as workers of a `DataLoader` are made."""
    return ThreadPoolExecutor(_threads(), "images")


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
