"""Decoding images: orientation, modes, invalid files, and threads."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import BadRowError, ModelError
from pipeline.records import Image as Picture
from pipeline.records import Ragged
from pipeline.tasks.images.pixels import decode, in_threads, pixel_values, thumbnail
from tests.support.pictures import encode, pixels


def as_file(image: Image.Image, form: str = "PNG", **settings: object) -> bytes:
    found = io.BytesIO()
    image.save(found, form, **settings)
    return found.getvalue()


def test_an_image_is_turned_as_its_orientation_says():
    array = pixels("red", np.random.default_rng(0), 16, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    turned = decode(as_file(Image.fromarray(array), exif=exif))
    assert turned.size == (8, 16)
    assert np.array_equal(np.asarray(turned), np.rot90(array, -1))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "I;16", "LA"])
def test_every_mode_becomes_rgb(mode):
    image = Image.fromarray(pixels("green", np.random.default_rng(0)))
    sixteen = Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    image = sixteen if mode == "I;16" else image.convert(mode)
    found = decode(as_file(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert (found.mode, found.size) == ("RGB", (8, 8))
    if mode == "I;16":
        assert np.array_equal(np.asarray(found)[..., 0], (np.arange(64) * 1000 // 256).reshape(8, 8))


def test_pixels_whose_range_is_not_known_are_refused():
    with pytest.raises(BadRowError, match="pixels of the mode F, whose range is not known"):
        decode(as_file(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"))


def test_a_part_beyond_the_image_and_a_processor_of_several_sizes_are_refused():
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    data = [Picture(encode(pixels("red", np.random.default_rng(0), side, 8)), f"{side}.png") for side in (8, 9)]
    beyond = Ragged.of(np.array([0, 0, 4, 4, 0, 5, 0, 5, 8, 0]), np.array([5, 5]))
    with pytest.raises(BadRowError, match=r"9\.png: expected a part of 9 x 8 pixels, found 5 x 8 at 5, 0"):
        pixel_values(data, beyond, ViTImageProcessorPil(size={"height": 8, "width": 8}))
    with pytest.raises(ModelError, match="returns images of different sizes, 8 x 8 and 8 x 9 pixels"):
        pixel_values(data, None, ViTImageProcessorPil(do_resize=False))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"no image", "no image in a known format"),
        (encode(pixels("red", np.random.default_rng(0), 64, 64), "JPEG")[:500], "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image in a known format"),
    ],
    ids=["text", "cut", "postscript"],
)
def test_what_is_no_image_is_one_line(data, match):
    with pytest.raises(BadRowError, match=match) as error:
        decode(data)
    assert "\n" not in str(error.value)


def test_an_image_of_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(BadRowError, match="exceeds limit"):
        decode(encode(pixels("red", np.random.default_rng(0))))


def test_threads_keep_the_order_and_raise_what_is_raised():
    assert list(in_threads(lambda i: i * i, range(1000))) == [i * i for i in range(1000)]

    def broken(number: int) -> int:
        if number == 30:
            raise BadRowError("thirty")
        return number

    found = in_threads(broken, range(100))
    assert [next(found) for _ in range(30)] == list(range(30))
    with pytest.raises(BadRowError, match="thirty"):
        next(found)


def test_a_thumbnail_is_small_and_of_the_part_that_is_seen():
    import base64

    data = encode(pixels("red", np.random.default_rng(0), 300, 100))
    uri = thumbnail(data, np.array([0, 0, 200, 100, 0]), side=50)
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).size == (50, 25)
    assert thumbnail(b"no image", None) == ""
