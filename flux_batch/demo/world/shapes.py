"""The recognition and placement of shapes by the pixels that they cover.

A model's shapes are soft and slightly deformed, so a perfect drawing is a bad reference: a star that has lost its
points resembles a circle. So a shape is recognised by the mean of drawings that are deformed at random.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from flux_batch.demo.world.captions import SHAPES, Shape
from flux_batch.demo.world.drawing import Mask, Placement, draw_shape

# The patch for comparison: its side in pixels, its width relative to a square of the shape's area (2.2), and its blur
# as a share of that square's side.
_PATCH = 16
_HALF = 1.1
_BLUR = 0.06
# Deformed drawings of each shape: their extents, how far points of a coarse grid are moved, and the blur, in pixels.
_CANVAS = 64
_EXTENTS = (32.0, 44.0, 56.0)
_DEFORMATIONS = ((1.0, 1.0), (2.0, 1.0), (2.0, 2.0), (3.0, 1.5))
_REPEATS = 8
_GRID = 6


def recognise(cover: Mask) -> Shape:
    """Return the shape that resembles the covered pixels most."""
    patch = _normalized(cover)
    means = _mean_patches()
    return min(SHAPES, key=lambda shape: float(np.square(patch - means[shape]).sum()))


def place(shape: Shape, cover: Mask) -> tuple[float, Placement]:
    """Return the overlap and placement of a shape of equal area and centre of mass.

    The overlap is the intersection over the union, 0 to 1.
    """
    height, width = cover.shape
    area, x, y = _moments(cover)
    area_of_one, x_of_one, y_of_one = _moments_of_shape(shape)
    extent = (area / area_of_one) ** 0.5
    placement = Placement(x - x_of_one * extent, y - y_of_one * extent, extent)
    drawn = draw_shape(shape, placement, width, height)
    return float(np.minimum(drawn, cover).sum() / np.maximum(drawn, cover).sum()), placement


def deformed(cover: Mask, shift: float, blur: float, rng: random.Random) -> Mask:
    """Return a deformed shape: points of a coarse grid moved by about `shift` pixels, then blurred."""
    height, width = cover.shape

    def shifts() -> Mask:
        grid = np.array([[rng.gauss(0, shift) for _ in range(_GRID)] for _ in range(_GRID)], np.float32)
        return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))

    rows = np.clip(np.arange(height)[:, None] + np.round(shifts()), 0, height - 1).astype(int)
    columns = np.clip(np.arange(width) + np.round(shifts()), 0, width - 1).astype(int)
    return sharpened(_blurred(cover[rows, columns], blur))


def sharpened(share: Mask) -> Mask:
    """Return the cover of each pixel by the share of a thing's colour in it.

    Both are 0 to 1. Edges of a model's things are soft.
    """
    cover: Mask = np.clip(1.5 * share - 0.25, 0, 1).astype(np.float32)
    return cover


@cache
def _mean_patches() -> dict[Shape, Mask]:
    """Return the mean of the patches of each shape's deformed drawings."""
    rng = random.Random(0)

    def patches(shape: Shape) -> Iterator[Mask]:
        for extent in _EXTENTS:
            drawn = draw_shape(shape, Placement(_CANVAS / 2, _CANVAS / 2, extent), _CANVAS, _CANVAS)
            for shift, blur in _DEFORMATIONS * _REPEATS:
                yield _normalized(deformed(drawn, shift, blur, rng))

    return {shape: np.mean(list(patches(shape)), axis=0) for shape in SHAPES}


def _normalized(cover: Mask) -> Mask:
    """Return the covered pixels scaled to a fixed size, centred at their mass: (_PATCH, _PATCH), 0 to 1."""
    area, x, y = _moments(cover)
    side = area**0.5
    box = (x - _HALF * side, y - _HALF * side, x + _HALF * side, y + _HALF * side)
    image = Image.fromarray(_blurred(cover, _BLUR * side))
    return np.asarray(image.transform((_PATCH, _PATCH), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR))


def _blurred(cover: Mask, radius: float) -> Mask:
    """Return a mask blurred, in 256 steps."""
    image = Image.fromarray(np.round(255 * cover).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image, np.float32) / np.float32(255)


def _moments(cover: Mask) -> tuple[float, float, float]:
    """Return area and centre of mass, in pixels."""
    area = float(cover.sum())
    x = float(cover.sum(axis=0) @ (np.arange(cover.shape[1]) + 0.5)) / area
    y = float(cover.sum(axis=1) @ (np.arange(cover.shape[0]) + 0.5)) / area
    return area, x, y


@cache
def _moments_of_shape(shape: Shape, extent: float = 200.0) -> tuple[float, float, float]:
    """Return the area and centre of mass of a shape of extent 1.

    The centre of mass is relative to its centre.
    """
    area, x, y = _moments(draw_shape(shape, Placement(128, 128, extent), 256, 256))
    return area / extent**2, (x - 128) / extent, (y - 128) / extent
