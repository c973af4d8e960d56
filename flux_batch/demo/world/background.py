"""The background of an image: a fit of each known texture, and the distance of each pixel from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from flux_batch.demo.world.captions import COLOURS, PALETTE, Background, Colour, Texture
from flux_batch.demo.world.drawing import Mask, Pixels, share_of_second
from flux_batch.demo.world.regions import Region

# A pixel this far from the background, in units of 8-bit RGB, belongs to a thing: half of MIN_CONTRAST.
FAR_OFF = 36.0
# Colours nearer than this count as equal: half the distance of the palette's nearest two, orange and yellow.
SAME_COLOUR = 44.0
# The tolerance at the edges of a pattern, in pixels, for shift and blur. Dots are too small for more.
_EDGE: dict[Texture, int] = {"plain": 0, "gradient": 0, "striped": 3, "checkered": 3, "dotted": 2}
# The share of an image that a pattern must explain in addition to a plainer texture.
_GAIN = 0.04


@dataclass(frozen=True, slots=True)
class BackgroundFit:
    """A texture with two colours (3,): `first` at share 0 of its pattern, `second` at share 1."""

    texture: Texture
    first: Pixels
    second: Pixels

    @property
    def span(self) -> float:
        """The distance between the two colours."""
        return float(np.linalg.norm(self.second - self.first))


def fit_background(pixels: Pixels) -> tuple[BackgroundFit, float]:
    """Return a texture and the share of the image that it explains.

    The plainest texture that explains nearly as much as the best one is chosen.
    """
    gradient = _fit_gradient(pixels)
    middle = (gradient.first + gradient.second) * np.float32(0.5)
    best = gradient if gradient.span >= SAME_COLOUR else BackgroundFit("plain", middle, middle)
    most = _explained_share(pixels, best)
    for texture in ("striped", "checkered", "dotted"):
        fit = _fit_pattern(pixels, texture)
        share = _explained_share(pixels, fit) if fit.span >= SAME_COLOUR else 0.0
        if share > most + _GAIN:
            best, most = fit, share
    return best, most


def _fit_pattern(pixels: Pixels, texture: Texture) -> BackgroundFit:
    """Return the median colours of a pattern's two areas: things cover less than half of their pixels."""
    low, high = _limits(texture, *_size_of(pixels))
    return BackgroundFit(texture, median(pixels[high < 0.02]), median(pixels[low > 0.98]))


def _fit_gradient(pixels: Pixels) -> BackgroundFit:
    """Return the gradient that fits the left and right edges.

    It is then fitted again to all pixels that it explains. A plain colour counts as a gradient. Things cover less than
    half of an edge, but at any height: of all lines through two parts of the edges, the fit has the least sum of
    distances to the parts, with each distance clipped at FAR_OFF.
    """
    height = pixels.shape[0]
    parts = np.array_split(np.arange(height), 16)
    ends = (slice(2), slice(-2, None))
    edges = [median(pixels[rows][:, columns].reshape(-1, 3)) for rows in parts for columns in ends]
    seen = np.stack(edges)
    heights = np.repeat([(rows.mean() + 0.5) / height for rows in parts], 2)
    i, j = np.triu_indices(len(seen), 1)
    apart = heights[j] - heights[i]
    i, j, apart = i[apart > 0.2], j[apart > 0.2], apart[apart > 0.2]
    slopes = (seen[j] - seen[i]) / apart[:, None]
    starts = seen[i] - slopes * heights[i, None]
    off = np.linalg.norm(starts[:, None] + slopes[:, None] * heights[None, :, None] - seen[None], axis=2)
    best = int(np.argmin(np.minimum(off, FAR_OFF).sum(axis=1)))
    fit = BackgroundFit("gradient", starts[best], starts[best] + slopes[best])
    for _ in range(2):
        fit = _refit_gradient(pixels, residual(pixels, fit) < FAR_OFF)
    return fit


def _refit_gradient(pixels: Pixels, where: Region) -> BackgroundFit:
    """Return the gradient that fits the pixels of a region by least squares."""
    height = pixels.shape[0]
    counts = where.sum(axis=1).astype(np.float32)
    sums = (pixels * where[..., None]).sum(axis=1)
    heights = (np.arange(height, dtype=np.float32) + 0.5) / height
    basis = np.stack([1 - heights, heights])
    normal = (basis * counts) @ basis.T
    first, second = np.linalg.lstsq(normal, basis @ sums, rcond=None)[0].astype(np.float32)
    return BackgroundFit("gradient", first, second)


def _explained_share(pixels: Pixels, fit: BackgroundFit) -> float:
    """Return the share of an image that is near the background."""
    return float(np.mean(residual(pixels, fit) < FAR_OFF))


def residual(pixels: Pixels, fit: BackgroundFit) -> Mask:
    """Return the distance of each pixel from the background, with tolerance at edges: (height, width)."""
    low, high = _limits(fit.texture, *_size_of(pixels))
    step = fit.second - fit.first
    along = (pixels - fit.first) @ step / max(float(step @ step), 1e-6)
    nearest = fit.first + np.clip(along, low, high)[..., None] * step
    return distance(pixels, nearest)


def distance(pixels: Pixels, others: Pixels) -> Mask:
    """Return the distance in RGB of each pixel from another or from one colour: (height, width)."""
    off: Mask = np.linalg.norm(pixels - others, axis=2).astype(np.float32)
    return off


def _size_of(pixels: Pixels) -> tuple[int, int]:
    """Return width and height."""
    return pixels.shape[1], pixels.shape[0]


@lru_cache(maxsize=64)
def _pattern(texture: Texture, width: int, height: int) -> Mask:
    """Return the share of the second colour in each pixel: (height, width)."""
    if texture == "plain":
        return np.zeros((height, width), np.float32)
    return share_of_second(Background(texture=texture, colour="black", second="white"), width, height)


@lru_cache(maxsize=64)
def _limits(texture: Texture, width: int, height: int) -> tuple[Mask, Mask]:
    """Return the least and greatest share of the second colour within `_EDGE` of each pixel."""
    share = _pattern(texture, width, height)
    if not _EDGE[texture]:
        return share, share
    image = Image.fromarray(np.round(share * 255).astype(np.uint8))
    kernel = 2 * _EDGE[texture] + 1
    low, high = image.filter(ImageFilter.MinFilter(kernel)), image.filter(ImageFilter.MaxFilter(kernel))
    return np.asarray(low, np.float32) / np.float32(255), np.asarray(high, np.float32) / np.float32(255)


def name_background(fit: BackgroundFit) -> Background:
    """Return the scene background that is nearest to a fit."""
    first, second = nearest_colour(fit.first), nearest_colour(fit.second)
    return Background(texture=fit.texture, colour=first, second=None if fit.texture == "plain" else second)


def distance_from_background(pixels: Pixels, fit: BackgroundFit, background_distance: Mask, colour: Pixels) -> Mask:
    """Return the distance of each pixel from the background.

    It is compared with the distance from a thing's colour.
    If the thing's colour is a mixture of the background's two colours, blurred edges of the pattern and the thing have
    the same colour: only the pattern without tolerance distinguishes them.
    """
    step = fit.second - fit.first
    share = float(np.clip((colour - fit.first) @ step / max(float(step @ step), 1e-6), 0, 1))
    if not _EDGE[fit.texture] or np.linalg.norm(fit.first + share * step - colour) > 2 * SAME_COLOUR:
        return background_distance
    sharp = fit.first + _pattern(fit.texture, *_size_of(pixels))[..., None] * step
    return np.minimum(distance(pixels, sharp), 1.5 * SAME_COLOUR)


def nearest_colour(rgb: Pixels) -> Colour:
    """Return the name of the palette's colour nearest to `rgb` (3,)."""
    return min(COLOURS, key=lambda colour: float(np.linalg.norm(rgb - np.array(PALETTE[colour], np.float32))))


def median(seen: Pixels) -> Pixels:
    """Return the median of pixels (n, 3): (3,)."""
    middle: Pixels = np.median(seen, axis=0).astype(np.float32)
    return middle
