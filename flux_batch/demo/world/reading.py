"""Reads an image of the small world back: which things stand where, and what lies behind them; knows no caption.

Plain image operations on an image whose shorter side is 128 pixels: what lies behind is fitted first, as one of the
known textures; what it does not explain are things, told apart by colour and place; a thing's shape is the one whose
drawing, of the same area and centre of mass, covers it best.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from flux_batch.demo.world.background import (
    FAR_OFF,
    SAME_COLOUR,
    Behind,
    distance,
    distance_from_behind,
    find_behind,
    median,
    name_behind,
    nearest_colour,
    residual,
)
from flux_batch.demo.world.captions import COLOURS, PALETTE, SHAPES, Background, Colour, Shape, Size
from flux_batch.demo.world.drawing import EXTENTS, Mask, Pixels, Placement, draw_shape
from flux_batch.demo.world.regions import Region, components, grown, opened, shrunk

# Every image is read at this length of its shorter side, in pixels; lengths below are at this scale.
SIDE = 128
# What lies behind must explain this share of an image; the two largest things leave 0.69.
MIN_EXPLAINED = 0.55
# Pixels. A small star covers 196, the specks that are no things up to 0.3 % of an image, 98 of one twice as wide.
MIN_AREA = 140.0
MAX_COLOURS = 8
# Overlap with the best shape below which a thing has none.
MIN_OVERLAP = 0.6
# Halfway, as a ratio, between the extents that are drawn.
SMALL_BELOW = (EXTENTS["small"] * EXTENTS["medium"]) ** 0.5
LARGE_ABOVE = (EXTENTS["medium"] * EXTENTS["large"]) ** 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadThing:
    """A thing in an image: centre in shares of width and height, extent in shares of the shorter side.

    `shape` is None if it looks like none of them.
    """

    shape: Shape | None
    colour: Colour
    size: Size
    x: float
    y: float
    extent: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What an image shows, larger things first; `background` is None if it is none of the textures."""

    things: tuple[ReadThing, ...]
    background: Background | None


def read_image(image: Image.Image) -> Reading:
    """Read an image of any size and aspect ratio; the world is drawn from 96 x 96 to 256 x 256."""
    pixels = normalized(image)
    behind, explained = find_behind(pixels)
    if explained < MIN_EXPLAINED:
        return Reading(things=(), background=None)
    return Reading(things=tuple(find_things(pixels, behind)), background=name_behind(behind))


def normalized(image: Image.Image) -> Pixels:
    """Scale an image to a shorter side of `SIDE`: (height, width, 3), 0 to 255."""
    scale = SIDE / min(image.size)
    width, height = (max(SIDE, round(length * scale)) for length in image.size)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float32)


def colour_share(image: Image.Image, colour: Colour) -> float:
    """Return the share of an image, 0 to 1, that is nearer to this colour than to any other and not far from it."""
    pixels = normalized(image)
    distances = [np.linalg.norm(pixels - np.array(rgb, np.float32), axis=2) for rgb in PALETTE.values()]
    nearest = np.argmin(distances, axis=0) == COLOURS.index(colour)
    return float(np.mean(nearest & (distances[COLOURS.index(colour)] < 2 * SAME_COLOUR)))


def find_things(pixels: Pixels, behind: Behind) -> list[ReadThing]:
    """Find the things, larger ones first.

    First their colours, from what cannot lie behind; then every pixel goes to the colour it is nearest to. So things
    that touch are apart, and one whose colour is a mixture of those behind is whole, edges of the pattern included.
    """
    off_behind = residual(pixels, behind)
    colours = find_colours(pixels, opened(off_behind >= FAR_OFF))
    if not colours:
        return []
    off_colours = np.stack([distance(pixels, colour) for colour in colours])
    nearest = np.argmin(off_colours, axis=0)
    is_thing = off_colours.min(axis=0) < off_behind
    found = []
    for number, (colour, off) in enumerate(zip(colours, off_colours, strict=True)):
        off_rest = distance_from_behind(pixels, behind, off_behind, colour)
        cover = np.clip(1.5 * off_rest / (off_rest + off + 1e-6) - 0.25, 0, 1)
        is_other = is_thing & (nearest != number)
        for region in components(opened(~is_other & (off < off_rest)), MIN_AREA / 2):
            cover_here = np.where(grown(region, 5) & ~is_other, cover, 0).astype(np.float32)
            if cover_here.sum() >= MIN_AREA:
                found.append((float(cover_here.sum()), describe(cover_here, colour)))
    return [thing for _, thing in sorted(found, key=lambda pair: -pair[0])]


def find_colours(pixels: Pixels, region: Region) -> list[Pixels]:
    """Find the colours of a region that holds things: each (3,), those of the largest parts first."""
    colours: list[Pixels] = []
    while len(colours) < MAX_COLOURS:
        parts = list(components(region, MIN_AREA / 8))
        if not parts:
            break
        core = core_of(max(parts, key=np.count_nonzero))
        colours.append(main_colour(pixels[core]))
        region = opened(region & (distance(pixels, colours[-1]) > 1.5 * SAME_COLOUR))
    return colours


def core_of(region: Region) -> Region:
    """Return what is well inside a region, or all of it if it is thin."""
    for by in (3, 2, 1):
        core = shrunk(region, by)
        if core.sum() >= MIN_AREA / 4:
            return core
    return region


def main_colour(seen: Pixels) -> Pixels:
    """Return the median of the most frequent colour among pixels (n, 3): (3,)."""
    palette = np.array(list(PALETTE.values()), np.float32)
    nearest = np.argmin(np.linalg.norm(seen[:, None] - palette, axis=2), axis=1)
    most = np.bincount(nearest).argmax()
    centre = median(seen[nearest == most])
    # Once more around it, since a shade between two of the palette falls to both.
    near = seen[np.linalg.norm(seen - centre, axis=1) < SAME_COLOUR]
    return median(near)


def describe(cover: Mask, colour: Pixels) -> ReadThing:
    """Name the shape, size and place of a thing from how much of each pixel it covers."""
    overlaps = {shape: overlap(shape, cover) for shape in SHAPES}
    shape = max(SHAPES, key=lambda shape: overlaps[shape][0])
    best, place = overlaps[shape]
    extent = place.extent / SIDE
    return ReadThing(
        shape=shape if best >= MIN_OVERLAP else None,
        colour=nearest_colour(colour),
        size="small" if extent < SMALL_BELOW else "large" if extent > LARGE_ABOVE else "medium",
        x=place.x / cover.shape[1],
        y=place.y / cover.shape[0],
        extent=extent,
    )


def overlap(shape: Shape, cover: Mask) -> tuple[float, Placement]:
    """Draw a shape of the same area and centre of mass. Returns: intersection over union, 0 to 1, and its placement."""
    height, width = cover.shape
    area, x, y = moments(cover)
    area_of_one, x_of_one, y_of_one = moments_of_shape(shape)
    extent = (area / area_of_one) ** 0.5
    place = Placement(x - x_of_one * extent, y - y_of_one * extent, extent)
    drawn = draw_shape(shape, place, width, height)
    return float(np.minimum(drawn, cover).sum() / np.maximum(drawn, cover).sum()), place


def moments(cover: Mask) -> tuple[float, float, float]:
    """Return area and centre of mass, in pixels."""
    area = float(cover.sum())
    x = float(cover.sum(axis=0) @ (np.arange(cover.shape[1]) + 0.5)) / area
    y = float(cover.sum(axis=1) @ (np.arange(cover.shape[0]) + 0.5)) / area
    return area, x, y


@lru_cache(maxsize=len(SHAPES))
def moments_of_shape(shape: Shape, extent: float = 200.0) -> tuple[float, float, float]:
    """Return the area of a shape of extent 1 and the centre of its mass relative to its own centre."""
    area, x, y = moments(draw_shape(shape, Placement(128, 128, extent), 256, 256))
    return area / extent**2, (x - 128) / extent, (y - 128) / extent
