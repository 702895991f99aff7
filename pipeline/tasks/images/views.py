"""Random crops of images, drawn from a seed: the random resized crop of Szegedy et al. (2015)."""

from __future__ import annotations

import math

import numpy as np

from pipeline.records import Views
from pipeline.softlabels import counter_uniforms

#: Range of a crop's aspect ratio, width over height.
RATIOS = (3 / 4, 4 / 3)
#: Number of attempts to draw a crop that fits the image; then the largest centred crop is used.
_TRIES = 10


def draw_view(width: int, height: int, views: Views, *, place: tuple[str, int, int]) -> np.ndarray:
    """Draw a random crop of an image.

    Args:
        width: the image's width, in pixels.
        height: the image's height, in pixels.
        place: split, source row and number of the view; with the seed they determine the crop.

    Returns:
        (5,) int32: left, top, width and height in pixels, and 1 if the crop is mirrored, else 0.

    The area is a uniform share of the image's, at least `views.smallest`. The aspect ratio is
    log-uniform in `RATIOS`, as in `torchvision.transforms.RandomResizedCrop`.
    """
    split, row, piece = place
    drawn = counter_uniforms(views.seed, f"view/{split}", row, piece, np.arange(4 * _TRIES + 1)).numpy()
    mirrored = int(views.mirror and drawn[-1] < 0.5)
    low, high = (math.log(ratio) for ratio in RATIOS)
    for share, shape, across, down in drawn[:-1].reshape(_TRIES, 4).tolist():
        area = width * height * (views.smallest + share * (1 - views.smallest))
        ratio = math.exp(low + shape * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return np.array([left, top, w, h, mirrored], dtype=np.int32)
    w = min(width, max(1, round(height * RATIOS[1])))
    h = min(height, max(1, round(width / RATIOS[0])))
    return np.array([(width - w) // 2, (height - h) // 2, w, h, mirrored], dtype=np.int32)
