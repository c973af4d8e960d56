"""The reading of things and backgrounds from images drawn here with Pillow, not by the package."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from flux_batch.demo.world.captions import PALETTE
from flux_batch.demo.world.reading import colour_share, read_image


def canvas(rgb: tuple[int, int, int], size: tuple[int, int] = (256, 256)) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", size, rgb)
    return image, ImageDraw.Draw(image)


def test_a_star_drawn_otherwise_is_read() -> None:
    image, pen = canvas((255, 255, 255))
    tips = [(math.pi * step / 5 - math.pi / 2, (60, 24)[step % 2]) for step in range(10)]
    pen.polygon([(190 + r * math.cos(a), 66 + r * math.sin(a)) for a, r in tips], fill=(200, 30, 50))

    reading = read_image(image)

    (thing,) = reading.things
    assert (thing.shape, thing.colour, thing.size) == ("star", "red", "large")
    assert thing.x == pytest.approx(190 / 256, abs=0.02)
    assert thing.y == pytest.approx(66 / 256, abs=0.02)
    assert reading.background is not None
    assert (reading.background.texture, reading.background.colour) == ("plain", "white")


def test_things_that_touch_are_two_if_their_colours_differ() -> None:
    image, pen = canvas(PALETTE["yellow"])
    pen.ellipse((40, 90, 120, 170), fill=PALETTE["blue"])
    pen.rectangle((120, 95, 190, 165), fill=PALETTE["black"])

    assert sorted((thing.shape, thing.colour) for thing in read_image(image).things) == [
        ("circle", "blue"),
        ("square", "black"),
    ]


def test_a_ring_is_no_circle() -> None:
    image, pen = canvas(PALETTE["green"])
    pen.ellipse((60, 60, 180, 180), fill=PALETTE["white"])
    assert [thing.shape for thing in read_image(image).things] == ["circle"]
    pen.ellipse((90, 90, 150, 150), fill=PALETTE["green"])
    assert [thing.shape for thing in read_image(image).things] == ["ring"]


def test_specks_are_no_things() -> None:
    image, pen = canvas(PALETTE["grey"])
    for place in range(20, 240, 40):
        pen.ellipse((place, place, place + 5, place + 5), fill=PALETTE["black"])

    assert read_image(image).things == ()


def test_a_shape_of_no_kind_has_none() -> None:
    image, pen = canvas(PALETTE["white"])
    pen.rectangle((20, 118, 236, 132), fill=PALETTE["purple"])

    (thing,) = read_image(image).things

    assert (thing.shape, thing.colour) == (None, "purple")


def test_noise_is_nothing() -> None:
    noise = np.random.default_rng(1).integers(0, 255, (128, 128, 3), dtype=np.uint8)

    reading = read_image(Image.fromarray(noise))

    assert reading.background is None
    assert reading.things == ()


def test_a_gradient_is_named_from_top_to_bottom() -> None:
    share = np.linspace(0, 1, 128)[:, None, None]
    pixels = np.array(PALETTE["red"]) * (1 - share) + np.array(PALETTE["blue"]) * share
    image = Image.fromarray(np.broadcast_to(pixels, (128, 160, 3)).astype(np.uint8))

    background = read_image(image).background

    assert background is not None
    assert (background.texture, background.colour, background.second) == ("gradient", "red", "blue")


def test_the_share_of_a_colour() -> None:
    image, pen = canvas(PALETTE["white"], (128, 128))
    pen.rectangle((0, 0, 63, 63), fill=PALETTE["red"])

    assert colour_share(image, "red") == pytest.approx(0.25, abs=0.01)
    assert colour_share(image, "white") == pytest.approx(0.75, abs=0.01)
    assert colour_share(image, "orange") == 0
