"""What lies behind the things of an image: a fit of each known texture, and how far each pixel is from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from flux_batch.demo.world.captions import COLOURS, PALETTE, Background, Colour, Texture
from flux_batch.demo.world.drawing import Mask, Pixels, share_of_second
from flux_batch.demo.world.regions import Region

# A pixel this far from all that may lie behind it, in units of 8-bit RGB, belongs to a thing: half of MIN_CONTRAST.
FAR_OFF = 36.0
# Colours nearer than this are one colour: half the way between the nearest two of the palette, orange and yellow.
SAME_COLOUR = 44.0
# How far the edges of a pattern may be off, or blurred. Dots are too small for more.
EDGE: dict[Texture, int] = {"plain": 0, "gradient": 0, "striped": 3, "checkered": 3, "dotted": 2}
# How much more of an image a pattern must explain than what is plainer.
GAIN = 0.04


@dataclass(frozen=True, slots=True)
class Behind:
    """What lies behind the things: at share 0 and 1 of a texture's pattern the colours `first` and `second`: (3,)."""

    texture: Texture
    first: Pixels
    second: Pixels

    @property
    def span(self) -> float:
        """Distance between the two colours."""
        return float(np.linalg.norm(self.second - self.first))


def find_behind(pixels: Pixels) -> tuple[Behind, float]:
    """Fit every texture. Returns: the plainest that explains nearly as much as the best, and the share it explains."""
    gradient = fit_gradient(pixels)
    middle = (gradient.first + gradient.second) * np.float32(0.5)
    best = gradient if gradient.span >= SAME_COLOUR else Behind("plain", middle, middle)
    most = explained_share(pixels, best)
    for texture in ("striped", "checkered", "dotted"):
        behind = fit_pattern(pixels, texture)
        share = explained_share(pixels, behind) if behind.span >= SAME_COLOUR else 0.0
        if share > most + GAIN:
            best, most = behind, share
    return best, most


def fit_pattern(pixels: Pixels, texture: Texture) -> Behind:
    """Take the median of the pixels where a pattern has one colour alone: things cover less than half of them."""
    low, high = limits(texture, *size_of(pixels))
    return Behind(texture, median(pixels[high < 0.02]), median(pixels[low > 0.98]))


def fit_gradient(pixels: Pixels) -> Behind:
    """Fit a gradient, of which a plain colour is one, to the left and right edges, then to all it explains.

    Things stand inside and cover less than half of an edge, but they may do so at any height: of all lines through
    two of its parts the one is taken to which the parts are nearest in sum, outliers counting alike.
    """
    height = pixels.shape[0]
    parts = np.array_split(np.arange(height), 16)
    ends = (slice(2), slice(-2, None))
    edges = [median(pixels[rows][:, columns].reshape(-1, 3)) for rows in parts for columns in ends]
    seen = np.stack(edges)
    place = np.repeat([(rows.mean() + 0.5) / height for rows in parts], 2)
    i, j = np.triu_indices(len(seen), 1)
    apart = place[j] - place[i]
    i, j, apart = i[apart > 0.2], j[apart > 0.2], apart[apart > 0.2]
    slopes = (seen[j] - seen[i]) / apart[:, None]
    starts = seen[i] - slopes * place[i, None]
    off = np.linalg.norm(starts[:, None] + slopes[:, None] * place[None, :, None] - seen[None], axis=2)
    best = int(np.argmin(np.minimum(off, FAR_OFF).sum(axis=1)))
    behind = Behind("gradient", starts[best], starts[best] + slopes[best])
    for _ in range(2):
        behind = refit_gradient(pixels, residual(pixels, behind) < FAR_OFF)
    return behind


def refit_gradient(pixels: Pixels, where: Region) -> Behind:
    """Fit a line to the pixels of a region by least squares."""
    height = pixels.shape[0]
    counts = where.sum(axis=1).astype(np.float32)
    sums = (pixels * where[..., None]).sum(axis=1)
    place = (np.arange(height, dtype=np.float32) + 0.5) / height
    basis = np.stack([1 - place, place])
    normal = (basis * counts) @ basis.T
    first, second = np.linalg.lstsq(normal, basis @ sums, rcond=None)[0].astype(np.float32)
    return Behind("gradient", first, second)


def explained_share(pixels: Pixels, behind: Behind) -> float:
    """Return the share of an image that may be nothing but what lies behind."""
    return float(np.mean(residual(pixels, behind) < FAR_OFF))


def residual(pixels: Pixels, behind: Behind) -> Mask:
    """Return how far each pixel is from all it may be, edges being off or blurred: (height, width)."""
    low, high = limits(behind.texture, *size_of(pixels))
    step = behind.second - behind.first
    along = (pixels - behind.first) @ step / max(float(step @ step), 1e-6)
    nearest = behind.first + np.clip(along, low, high)[..., None] * step
    return distance(pixels, nearest)


def distance(pixels: Pixels, others: Pixels) -> Mask:
    """Return the distance in RGB of each pixel from another or from one colour: (height, width)."""
    off: Mask = np.linalg.norm(pixels - others, axis=2).astype(np.float32)
    return off


def size_of(pixels: Pixels) -> tuple[int, int]:
    """Return width and height."""
    return pixels.shape[1], pixels.shape[0]


@lru_cache(maxsize=64)
def pattern(texture: Texture, width: int, height: int) -> Mask:
    """Return how much of the second colour each pixel has: (height, width)."""
    if texture == "plain":
        return np.zeros((height, width), np.float32)
    return share_of_second(Background(texture=texture, colour="black", second="white"), width, height)


@lru_cache(maxsize=64)
def limits(texture: Texture, width: int, height: int) -> tuple[Mask, Mask]:
    """Return the least and the greatest share of the second colour within `EDGE` of each pixel."""
    share = pattern(texture, width, height)
    if not EDGE[texture]:
        return share, share
    image = Image.fromarray(np.round(share * 255).astype(np.uint8))
    kernel = 2 * EDGE[texture] + 1
    low, high = image.filter(ImageFilter.MinFilter(kernel)), image.filter(ImageFilter.MaxFilter(kernel))
    return np.asarray(low, np.float32) / np.float32(255), np.asarray(high, np.float32) / np.float32(255)


def name_behind(behind: Behind) -> Background:
    """Name the texture and its colours."""
    first, second = nearest_colour(behind.first), nearest_colour(behind.second)
    return Background(texture=behind.texture, colour=first, second=None if behind.texture == "plain" else second)


def distance_from_behind(pixels: Pixels, behind: Behind, off_behind: Mask, colour: Pixels) -> Mask:
    """Return how far each pixel is from what lies behind, to tell it from a thing's colour.

    Where that is a mixture of the colours behind, blurred edges would pass for the thing and the thing for edges:
    only the pattern as it should be tells them apart, and only of pixels that have the colour.
    """
    step = behind.second - behind.first
    share = float(np.clip((colour - behind.first) @ step / max(float(step @ step), 1e-6), 0, 1))
    if not EDGE[behind.texture] or np.linalg.norm(behind.first + share * step - colour) > 2 * SAME_COLOUR:
        return off_behind
    sharp = behind.first + pattern(behind.texture, *size_of(pixels))[..., None] * step
    return np.minimum(distance(pixels, sharp), 1.5 * SAME_COLOUR)


def nearest_colour(rgb: Pixels) -> Colour:
    """Name a colour (3,)."""
    return min(COLOURS, key=lambda colour: float(np.linalg.norm(rgb - np.array(PALETTE[colour], np.float32))))


def median(seen: Pixels) -> Pixels:
    """Return the median of pixels (n, 3): (3,)."""
    middle: Pixels = np.median(seen, axis=0).astype(np.float32)
    return middle
