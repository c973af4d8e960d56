"""Shapes are recognised when they are small, and when their outlines are soft or distorted."""

from __future__ import annotations

import random

import pytest

from flux_batch.demo.world.captions import SHAPES, Shape
from flux_batch.demo.world.drawing import Placement, draw_shape
from flux_batch.demo.world.shapes import deformed, place, recognise


@pytest.mark.parametrize("extent", [24.0, 32.0, 56.0])
def test_drawings_are_recognised_and_placed(extent: float) -> None:
    for shape in SHAPES:
        drawn = draw_shape(shape, Placement(70.5, 50.25, extent), 128, 96)

        assert recognise(drawn) == shape
        overlap, placed = place(shape, drawn)
        assert overlap > 0.95
        assert (placed.x, placed.y) == pytest.approx((70.5, 50.25), abs=0.3)
        assert placed.extent == pytest.approx(extent, abs=0.6)


@pytest.mark.parametrize(("shift", "blur", "least"), [(1.0, 1.0, 1.0), (2.0, 2.0, 0.95), (3.0, 1.5, 0.9)])
def test_soft_shapes_out_of_form_are_recognised(shift: float, blur: float, least: float) -> None:
    rng = random.Random(7)

    def is_recognised(shape: Shape) -> bool:
        drawn = draw_shape(shape, Placement(64, 64, rng.choice((32.0, 44.0, 56.0))), 128, 128)
        return recognise(deformed(drawn, shift, blur, rng)) == shape

    held = [is_recognised(shape) for shape in SHAPES for _ in range(20)]
    assert sum(held) >= least * len(held)


def test_what_has_no_shape_overlaps_none() -> None:
    line = draw_shape("square", Placement(64, 64, 40), 128, 128)
    line[:, :62] = 0
    line[:, 66:] = 0

    assert place(recognise(line), line)[0] < 0.6
