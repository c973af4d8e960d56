"""The reading of an image of the demo's world: its things and its background.

It uses plain image operations on an image whose shorter side is 128 pixels. The background is fitted first, as one of
the known textures. The rest are things, separated by colour and position; each gets the shape that it resembles most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from flux_batch.demo.world.background import (
    FAR_OFF,
    SAME_COLOUR,
    BackgroundFit,
    distance,
    distance_from_background,
    fit_background,
    median,
    name_background,
    nearest_colour,
    residual,
)
from flux_batch.demo.world.captions import COLOURS, MIN_CONTRAST, PALETTE, Background, Colour, Shape, Size
from flux_batch.demo.world.drawing import EXTENTS, Mask, Pixels
from flux_batch.demo.world.regions import Region, components, grown, opened, shrunk
from flux_batch.demo.world.shapes import place, recognise, sharpened

# The shorter side to which every image is scaled, in pixels; the lengths below are at this scale.
_SIDE = 128
# The share of an image that the background must explain; the two largest things leave 0.69.
_MIN_EXPLAINED = 0.55
# In pixels. A small star is drawn with 196 and may lose some; specks cover up to 0.3 % of an image, or 98 pixels if it
# is twice as wide. A smaller part without a shape is a mixture where two colours meet.
_LEAST_THING = 196.0
_MIN_AREA = 140.0
_MAX_COLOURS = 8
# The least overlap of a thing with its shape.
_MIN_OVERLAP = 0.6
# The least distance of a thing from the background in RGB. Drawn things have MIN_CONTRAST or more; a part nearer than
# this is a glow around a thing, or a flaw of the pattern.
_LEAST_CONTRAST = MIN_CONTRAST * 2 / 3
# The geometric means of the extents that are drawn.
_SMALL_BELOW = (EXTENTS["small"] * EXTENTS["medium"]) ** 0.5
_LARGE_ABOVE = (EXTENTS["medium"] * EXTENTS["large"]) ** 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadThing:
    """A thing in an image: centre in shares of width and height, extent in shares of the shorter side.

    `shape` is None if it resembles no known shape.
    """

    shape: Shape | None
    colour: Colour
    size: Size
    x: float
    y: float
    extent: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The content of an image, larger things first; `background` is None if no texture fits."""

    things: tuple[ReadThing, ...]
    background: Background | None


def read_image(image: Image.Image) -> Reading:
    """Read an image of any size and aspect ratio; the world is drawn from 96 x 96 to 256 x 256."""
    pixels = _normalized(image)
    fit, explained = fit_background(pixels)
    if explained < _MIN_EXPLAINED:
        return Reading(things=(), background=None)
    return Reading(things=tuple(_find_things(pixels, fit)), background=name_background(fit))


def _normalized(image: Image.Image) -> Pixels:
    """Return an image scaled to a shorter side of `_SIDE`: (height, width, 3), 0 to 255."""
    scale = _SIDE / min(image.size)
    width, height = (max(_SIDE, round(length * scale)) for length in image.size)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float32)


def colour_share(image: Image.Image, colour: Colour) -> float:
    """Return the share of an image that is near a colour, 0 to 1. A pixel counts for its nearest colour only."""
    pixels = _normalized(image)
    distances = [np.linalg.norm(pixels - np.array(rgb, np.float32), axis=2) for rgb in PALETTE.values()]
    nearest = np.argmin(distances, axis=0) == COLOURS.index(colour)
    return float(np.mean(nearest & (distances[COLOURS.index(colour)] < 2 * SAME_COLOUR)))


def _find_things(pixels: Pixels, fit: BackgroundFit) -> list[ReadThing]:
    """Return the things, larger ones first.

    First their colours are found among the pixels far from the background; then each pixel goes to the nearest colour.
    So touching things are separated, and a thing in a mixture of the background's colours stays whole.
    """
    background_distance = residual(pixels, fit)
    colours = _find_colours(pixels, opened(background_distance >= FAR_OFF))
    if not colours:
        return []
    off_colours = np.stack([distance(pixels, colour) for colour in colours])
    nearest = np.argmin(off_colours, axis=0)
    is_thing = off_colours.min(axis=0) < background_distance
    found = []
    for number, (colour, off) in enumerate(zip(colours, off_colours, strict=True)):
        if min(np.linalg.norm(colour - of_pattern) for of_pattern in (fit.first, fit.second)) < SAME_COLOUR:
            continue  # a flaw of the pattern: things never have a colour of their background
        off_rest = distance_from_background(pixels, fit, background_distance, colour)
        cover = sharpened(off_rest / (off_rest + off + 1e-6))
        is_other = is_thing & (nearest != number)
        for region in components(opened(~is_other & (off < off_rest)), _MIN_AREA / 2):
            cover_here = np.where(grown(region, 5) & ~is_other, cover, 0).astype(np.float32)
            if cover_here.sum() < _MIN_AREA or np.median(off_rest[region]) < _LEAST_CONTRAST:
                continue
            # The colour of this thing alone: a colour found over the whole image may lie between those of two things.
            thing = _describe(cover_here, _main_colour(pixels[_core_of(region)]))
            if thing.shape or cover_here.sum() >= _LEAST_THING:
                found.append((float(cover_here.sum()), thing))
    things = [thing for _, thing in sorted(found, key=lambda pair: -pair[0])]
    return [thing for number, thing in enumerate(things) if not any(_is_hole(thing, ring) for ring in things[:number])]


def _is_hole(thing: ReadThing, ring: ReadThing) -> bool:
    """Return whether a thing is the hole of a larger ring: two things never have the same centre."""
    return ring.shape == "ring" and max(abs(thing.x - ring.x), abs(thing.y - ring.y)) < ring.extent / 8


def _find_colours(pixels: Pixels, region: Region) -> list[Pixels]:
    """Return the colours of the things in a region, each (3,), the largest parts first."""
    colours: list[Pixels] = []
    while len(colours) < _MAX_COLOURS:
        parts = list(components(region, _MIN_AREA / 8))
        if not parts:
            break
        core = _core_of(max(parts, key=np.count_nonzero))
        colours.append(_main_colour(pixels[core]))
        region = opened(region & (distance(pixels, colours[-1]) > 1.5 * SAME_COLOUR))
    return colours


def _core_of(region: Region) -> Region:
    """Return the inner part of a region, or all of it if it is thin."""
    for by in (3, 2, 1):
        core = shrunk(region, by)
        if core.sum() >= _MIN_AREA / 4:
            return core
    return region


def _main_colour(seen: Pixels) -> Pixels:
    """Return the median of the most frequent colour among pixels (n, 3): (3,)."""
    palette = np.array(list(PALETTE.values()), np.float32)
    nearest = np.argmin(np.linalg.norm(seen[:, None] - palette, axis=2), axis=1)
    most = np.bincount(nearest).argmax()
    centre = median(seen[nearest == most])
    # Repeat around that colour, since a shade between two colours of the palette is split between them.
    near = seen[np.linalg.norm(seen - centre, axis=1) < SAME_COLOUR]
    return median(near)


def _describe(cover: Mask, colour: Pixels) -> ReadThing:
    """Return the thing that covers a share of each pixel: its shape, size and position."""
    shape = recognise(cover)
    overlap, placement = place(shape, cover)
    extent = placement.extent / _SIDE
    return ReadThing(
        shape=shape if overlap >= _MIN_OVERLAP else None,
        colour=nearest_colour(colour),
        size="small" if extent < _SMALL_BELOW else "large" if extent > _LARGE_ABOVE else "medium",
        x=placement.x / cover.shape[1],
        y=placement.y / cover.shape[0],
        extent=extent,
    )
