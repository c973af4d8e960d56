"""The image arguments of a call: an unusable image is an error that names its argument."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flux_batch.errors import InvalidSetting
from flux_batch.pipeline.images.ip_adapter import clip_pixels
from flux_batch.pipeline.images.pixels import to_mask_pixels, to_pixels
from flux_batch.pipeline.images.redux import siglip_pixels

READERS: dict[str, Callable[[Any], Any]] = {
    "input_image": partial(to_pixels, width=32, height=16),
    "mask_image": partial(to_mask_pixels, width=32, height=16),
    "image_prompt of Redux": partial(siglip_pixels, side=28),
    "image_prompt of an IP-Adapter": partial(clip_pixels, side=28),
}


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def file_of(image: Image.Image) -> io.BytesIO:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data


def cut_short() -> Image.Image:
    return Image.open(io.BytesIO(file_of(noise(64, 64)).getvalue()[:5000]))


def closed() -> Image.Image:
    image = Image.open(file_of(noise(8, 8)))
    image.close()
    return image


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: "a.png", "is a str: must be a PIL image"),
        (lambda: Image.new("RGB", (0, 5)), "is 0 x 5 pixels: must have some"),
        (lambda: Image.new("F", (8, 8)), "has 32-bit samples, whose white level is unknown"),
        (cut_short, "cannot be read: "),
        (closed, "cannot be read: "),
    ],
)
def test_an_image_that_cannot_be_used_is_refused_by_its_argument(
    reader: str, make: Callable[[], Any], words: str
) -> None:
    with pytest.raises(InvalidSetting) as caught:
        READERS[reader](make())
    assert str(caught.value).startswith(f"{reader.partition(' ')[0]} {words}")
    assert caught.value.field == reader.partition(" ")[0]


@pytest.mark.parametrize("size", [(700, 8), (8, 700), (97, 8), (60, 40)])
def test_an_ip_adapter_reads_the_middle_of_an_image_however_long(size: tuple[int, int]) -> None:
    """Resizing the whole of a very long image would need gigabytes."""
    image, side = noise(*size), 28
    shorter = min(size)
    whole = image.resize((side * size[0] // shorter, side * size[1] // shorter), Image.Resampling.BICUBIC)
    left, top = (whole.width - side) // 2, (whole.height - side) // 2
    expected = clip_pixels(whole.crop((left, top, left + side, top + side)), side)

    # Up to one of 255 levels, over a standard deviation of at least 0.25, if the middle is cut at other pixels.
    close = 1.01 / 255 / 0.25 if max(size) > 16 * shorter else 0.0
    torch.testing.assert_close(clip_pixels(image, side), expected, atol=close, rtol=0)
