from __future__ import annotations

import random

import numpy as np
from PIL import Image

from flux_batch.demo.world.captions import Background, Scene, Thing
from flux_batch.demo.world.drawing import draw
from flux_batch.demo.world.edges import edges

SQUARE = Thing(shape="square", colour="white", size="large")


def test_edges_are_white_where_colours_meet_and_nowhere_else() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, 16:] = 255

    shown = np.asarray(edges(Image.fromarray(pixels)))

    assert np.all(shown[:, 15:17] == 255)
    assert not shown[:, :15].any()
    assert not shown[:, 17:].any()


def test_a_gradient_has_no_edges_but_those_of_the_thing_on_it() -> None:
    background = Background(texture="gradient", colour="black", second="blue")
    scene = Scene(first=SQUARE, background=background, position="centre")

    shown = np.asarray(edges(draw(scene, 128, 128, random.Random(0))).convert("L")) > 0

    assert shown.any()
    assert not shown[:30].any()
    assert not shown[98:].any()
