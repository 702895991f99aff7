"""Convert encoded images to pixel values: decode, crop to a view, apply the image processor."""

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

#: The accepted file formats. Pillow reads others too, some by starting external programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
#: Number of items (images, or parts of a batch) per thread that are processed ahead.
_AHEAD = 4
#: Batches whose images are smaller than this on average, in bytes, are decoded in one thread, since
#: the overhead of threads exceeds their gain.
_SMALL = 16 << 10

Item = TypeVar("Item")
Found = TypeVar("Found")


def decode(data: bytes) -> Any:
    """Decode an image as a `PIL.Image.Image` in RGB.

    The EXIF orientation is applied. Of an animation, the first frame is decoded.

    Raises:
        BadRowError: the data is no image in one of `FORMATS`, is damaged, or has so many pixels
            that Pillow refuses it.
    """
    import PIL.Image
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large images; above twice the size it raises
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                turned = ImageOps.exif_transpose(image)
                return _in_bytes(turned).convert("RGB")
    except BadRowError:
        raise
    except Exception as error:  # each decoder raises different exceptions
        why = "no image in a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadRowError(f"cannot be decoded: {' '.join(why.split())[:200]}") from None


def _in_bytes(image: Any) -> Any:
    """Convert an image of 16 bits per channel to 8 bits, by dropping the lower 8 bits.

    Pillow's `convert` would clip the values instead. Images of 8 bits stay unchanged.

    Raises:
        BadRowError: the pixels are 32-bit integers or floats, whose range is not known.
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
    """Return the (B, C, H, W) float32 pixel values of a batch of images.

    Args:
        images: B images.
        views: the part of each image to use, as in `TokenizedExample.view`; None: whole images.
        processor: a `transformers` image processor; it resizes and normalises each part like a
            whole image.

    Raises:
        BadRowError: an image cannot be decoded, or a view is outside of its image; the message
            begins with the image's name.
        ModelError: the processor returns different sizes.
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
        # One at a time, so that no result depends on the other images of the batch.
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
            f"the image processor returns images of different sizes, {h} x {w} and {height} x {width} pixels; set a fixed size or crop in preprocessor_config.json"
        )
    return torch.cat(list(pixels))


def cut(image: Any, view: np.ndarray | None) -> Any:
    """Crop a `PIL.Image.Image` to a view, and mirror it if the view says so.

    Raises:
        BadRowError: the view is outside of the image.
    """
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
    """Return a `data:` URI of a PNG thumbnail of a view, at most `side` pixels wide and high.

    It is empty if the image cannot be decoded or cropped.
    """
    try:
        small = cut(decode(data), view)
    except BadRowError:
        return ""
    small.thumbnail((side, side))
    found = io.BytesIO()
    small.save(found, "PNG")
    return f"data:image/png;base64,{base64.b64encode(found.getvalue()).decode()}"


def in_threads(function: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
    """Apply a function in several threads, a few items ahead; results are in the order of items.

    Threads help because decoding and resizing release Python's global interpreter lock.
    """
    pool, waiting = _pool(os.getpid()), iter(items)
    ahead = [pool.submit(function, item) for item in itertools.islice(waiting, _AHEAD * _threads())]
    while ahead:
        yield ahead.pop(0).result()
        ahead += [pool.submit(function, item) for item in itertools.islice(waiting, 1)]


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the thread pool of a process: threads do not survive a fork (`DataLoader` workers)."""
    return ThreadPoolExecutor(_threads(), "images")


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
