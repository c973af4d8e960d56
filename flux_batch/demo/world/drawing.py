"""The drawing of a scene: facts in, an anti-aliased image out."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from flux_batch.demo.world.captions import PALETTE, Background, Colour, Position, Relation, Scene, Shape, Size

Pixels = NDArray[np.float32]  # (height, width, 3), 0 to 255
Mask = NDArray[np.float32]  # (height, width), 0 to 1
_Point = tuple[float, float]

# Each edge pixel is the mean of this many samples along either axis.
_SAMPLES = 4
# Extent of a thing as a share of the shorter side of the image.
EXTENTS: dict[Size, float] = {"small": 0.25, "medium": 0.34, "large": 0.44}
# Centres as shares of width and height.
_NEAR, _MIDDLE, _FAR = 0.26, 0.50, 0.74
CENTRES: dict[Position, _Point] = {
    "centre": (_MIDDLE, _MIDDLE),
    "top": (_MIDDLE, _NEAR),
    "bottom": (_MIDDLE, _FAR),
    "left": (_NEAR, _MIDDLE),
    "right": (_FAR, _MIDDLE),
    "top left": (_NEAR, _NEAR),
    "top right": (_FAR, _NEAR),
    "bottom left": (_NEAR, _FAR),
    "bottom right": (_FAR, _FAR),
}
CENTRES_OF_PAIR: dict[Relation, tuple[_Point, _Point]] = {
    "left of": ((_NEAR, _MIDDLE), (_FAR, _MIDDLE)),
    "right of": ((_FAR, _MIDDLE), (_NEAR, _MIDDLE)),
    "above": ((_MIDDLE, _NEAR), (_MIDDLE, _FAR)),
    "below": ((_MIDDLE, _FAR), (_MIDDLE, _NEAR)),
}
# The largest shift of a thing from its centre, and of a pair across its axis, in shares of the image.
JITTER = 0.015
PAIR_DRIFT = 0.04
# The period of stripes, checks and dots in pixels at 128 x 128; in proportion at other sizes.
_PERIOD = 32.0
_PERIOD_SIDE = 128.0
_DOT_RADIUS = 0.26  # of the period of dots, half that of stripes


@dataclass(frozen=True, slots=True)
class Placement:
    """The centre and extent of a thing, in pixels."""

    x: float
    y: float
    extent: float


def draw(scene: Scene, width: int, height: int, rng: random.Random) -> Image.Image:
    """Return the image of a scene; `rng` slightly moves things and shades colours."""
    pixels = _draw_background(scene.background, width, height, rng)
    things = [thing for thing in (scene.first, scene.second) if thing]
    for thing, place in zip(things, placements(scene, width, height, rng), strict=True):
        mask = draw_shape(thing.shape, place, width, height)[..., None]
        pixels = pixels * (1 - mask) + _shade(thing.colour, rng) * mask
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))


def placements(scene: Scene, width: int, height: int, rng: random.Random) -> list[Placement]:
    """Return the placement of each thing."""
    if scene.position is not None:
        return [_place(CENTRES[scene.position], scene.first.size, width, height, rng)]
    assert scene.relation is not None
    assert scene.second is not None
    drift = (2 * rng.random() - 1) * PAIR_DRIFT
    across = (0.0, drift) if scene.relation in ("left of", "right of") else (drift, 0.0)
    centres = [(x + across[0], y + across[1]) for x, y in CENTRES_OF_PAIR[scene.relation]]
    sizes = (scene.first.size, scene.second.size)
    return [_place(centre, size, width, height, rng) for centre, size in zip(centres, sizes, strict=True)]


def _place(centre: _Point, size: Size, width: int, height: int, rng: random.Random) -> Placement:
    """Return the placement of a thing near a centre, inside the image. The centre is in shares of the image."""
    x, y = (share + (2 * rng.random() - 1) * JITTER for share in centre)
    extent = EXTENTS[size] * (0.96 + 0.08 * rng.random()) * min(width, height)
    margin = extent / 2 + 1
    return Placement(min(max(x * width, margin), width - margin), min(max(y * height, margin), height - margin), extent)


def _shade(colour: Colour, rng: random.Random, spread: float = 6.0) -> Pixels:
    """Return a colour close to that of the palette: (3,)."""
    return np.array([channel + (2 * rng.random() - 1) * spread for channel in PALETTE[colour]], np.float32)


def _draw_background(background: Background, width: int, height: int, rng: random.Random) -> Pixels:
    """Return an image of only the background. A gradient runs from top to bottom, stripes are vertical."""
    first = _shade(background.colour, rng)
    if background.second is None:
        return np.broadcast_to(first, (height, width, 3)).copy()
    second = _shade(background.second, rng)
    share = share_of_second(background, width, height)[..., None]
    pixels: Pixels = first * (1 - share) + second * share
    return pixels


def share_of_second(background: Background, width: int, height: int) -> Mask:
    """Return the share of the second colour in each pixel of a background: (height, width)."""
    # The middle of each sample, in periods: the same number of periods along the shorter side at every size.
    period = _PERIOD * min(width, height) / _PERIOD_SIDE
    x, y = (((np.arange(length * _SAMPLES) + 0.5) / _SAMPLES / period) for length in (width, height))
    if background.texture == "gradient":
        row = (np.arange(height, dtype=np.float32) + 0.5) / height
        return np.broadcast_to(row[:, None], (height, width)).astype(np.float32)
    odd_x, odd_y = (x % 1 >= 0.5)[None, :], (y % 1 >= 0.5)[:, None]
    if background.texture == "striped":
        inside = np.broadcast_to(odd_x, (len(y), len(x)))
    elif background.texture == "checkered":
        inside = odd_x != odd_y
    else:
        dot_x, dot_y = ((2 * axis) % 1 - 0.5 for axis in (x, y))
        inside = dot_x[None, :] ** 2 + dot_y[:, None] ** 2 < _DOT_RADIUS**2
    return _mean_of_samples(inside.astype(np.float32))


def _mean_of_samples(samples: Mask) -> Mask:
    """Return the means of squares of `_SAMPLES` by `_SAMPLES` samples."""
    height, width = (length // _SAMPLES for length in samples.shape)
    means: Mask = samples.reshape(height, _SAMPLES, width, _SAMPLES).mean(axis=(1, 3), dtype=np.float32)
    return means


def draw_shape(shape: Shape, place: Placement, width: int, height: int) -> Mask:
    """Return the share of each pixel that a shape covers: (height, width)."""
    left, top = math.floor(place.x - place.extent / 2) - 1, math.floor(place.y - place.extent / 2) - 1
    side = math.ceil(place.extent) + 3
    canvas = Image.new("L", (side * _SAMPLES, side * _SAMPLES))
    radius = place.extent / 2 * _SAMPLES
    centre = ((place.x - left) * _SAMPLES, (place.y - top) * _SAMPLES)
    for outline, fill in _outlines(shape):
        # Pillow draws edges as inside, so points are moved by half a sample.
        points = [(centre[0] + x * radius - 0.5, centre[1] + y * radius - 0.5) for x, y in outline]
        ImageDraw.Draw(canvas).polygon(points, fill=fill)
    patch = _mean_of_samples(np.asarray(canvas, np.float32) / np.float32(255))
    mask: Mask = np.zeros((height, width), np.float32)
    rows, columns = slice(max(top, 0), min(top + side, height)), slice(max(left, 0), min(left + side, width))
    mask[rows, columns] = patch[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return mask


def _outlines(shape: Shape) -> list[tuple[Sequence[_Point], int]]:
    """Return the polygons of a shape in [-1, 1], y down, and their fill: 255 the shape, 0 a hole."""
    if shape == "circle":
        return [(_arc(1.0), 255)]
    if shape == "ring":
        return [(_arc(1.0), 255), (_arc(0.52), 0)]
    if shape == "square":
        return [([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)], 255)]
    if shape == "diamond":
        return [([(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)], 255)]
    if shape == "triangle":
        return [([(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)], 255)]
    if shape == "star":
        radii = (1.05, 0.42)
        angles = [math.pi * (step / 5 - 0.5) for step in range(10)]
        return [([(radii[i % 2] * math.cos(a), radii[i % 2] * math.sin(a) + 0.08) for i, a in enumerate(angles)], 255)]
    if shape == "cross":
        w = 0.34
        half = [(-w, -1.0), (w, -1.0), (w, -w), (1.0, -w), (1.0, w), (w, w)]
        return [([*half, *((-x, -y) for x, y in half)], 255)]
    return [(_heart(), 255)]


def _arc(radius: float, steps: int = 48) -> list[_Point]:
    """Return a circle as a polygon."""
    turns = [2 * math.pi * step / steps for step in range(steps)]
    return [(radius * math.cos(turn), radius * math.sin(turn)) for turn in turns]


def _heart(steps: int = 48) -> list[_Point]:
    """Return the usual heart curve, scaled to fill [-1, 1]."""
    turns = [2 * math.pi * step / steps for step in range(steps)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5) / 14.5,
        )
        for t in turns
    ]
