"""The autoencoder in overlapping tiles, which needs less memory for large images.

A tile sees nothing beyond its border, so a tiled image differs a little from one computed whole. Sizes, strides and the
width of the blend are those of DiffSynth-Studio (105fe39, diffsynth/models/tiler.py, TileWorker). DiffSynth-Studio
leaves the ends of some sizes uncovered and fades at the borders of the image too, which causes seams. Here the last
tile of a row or column is moved back to end with the image, and tiles fade only towards other tiles.
Letters: b batch, c channels, h and w of the image or the latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.sampling import HOST, on_device


class Tiling(NamedTuple):
    """Size and distance of tiles, in latents when decoding, in pixels when encoding; defaults of DiffSynth-Studio."""

    size: int = 128
    stride: int = 64


def tiled_decode(autoencoder: AutoEncoder, z: Tensor, tiling: Tiling) -> Tensor:
    """Return pixels, about [-1, 1]: scaled latents (b, z, h, w) -> (b, 3, 8h, 8w)."""
    return blend_tiles(autoencoder.decode, z, tiling)


def tiled_moments(autoencoder: AutoEncoder, image: Tensor, tiling: Tiling) -> Tensor:
    """Return the means and logvars of latents, for `AutoEncoder.sample`: (b, 3, h, w) -> (b, 2z, h/8, w/8).

    Sizes and strides are rounded down to whole latents.
    """
    step = autoencoder.params.downscale
    whole = Tiling(max(step, tiling.size // step * step), max(step, tiling.stride // step * step))
    return blend_tiles(autoencoder.encoder, image, whole)


def blend_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiling) -> Tensor:
    """Return function(x), computed tile by tile: (b, c, h, w) -> (b, c', s h, s w), in the dtype of x.

    function: scales h and w by the same factor s. One tile of one image is computed at a time, and sums are in fp32. If
    x fits into one tile, the result is function(x) itself.
    Raises: ValueError unless 1 <= stride <= size: wider strides leave gaps.
    """
    if not 1 <= tiling.stride <= tiling.size:
        raise ValueError(f"tiles of {tiling.size} every {tiling.stride}: the stride must be from 1 to the size")
    if max(x.shape[-2:]) <= tiling.size:
        return function(x)
    return torch.cat([_blend_one(function, image, tiling) for image in x.split(1)])


def starts(length: int, size: int, stride: int) -> list[int]:
    """Return the starts of tiles that cover `length` without a gap; the last tile ends at `length`."""
    return [*range(0, length - size, stride), max(length - size, 0)]


def _blend_one(function: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiling) -> Tensor:
    height, width = x.shape[-2:]
    tile_height, tile_width = min(tiling.size, height), min(tiling.size, width)
    total = weights = torch.empty(0)
    for row in starts(height, tile_height, tiling.stride):
        for col in starts(width, tile_width, tiling.stride):
            tile = function(x[..., row : row + tile_height, col : col + tile_width]).float()
            h, w = tile.shape[-2:]
            if not total.numel():
                total = tile.new_zeros(*tile.shape[:2], height * h // tile_height, width * w // tile_width)
                weights = tile.new_zeros(total.shape[-2:])
            top, left, border = row * h // tile_height, col * w // tile_width, tiling.stride // 2 * h // tile_height
            down = fade(h, border, at_start=row > 0, at_end=row + tile_height < height)
            along = fade(w, border, at_start=col > 0, at_end=col + tile_width < width)
            weight = on_device(down[:, None] * along, tile.device)
            total[..., top : top + h, left : left + w] += tile * weight
            weights[top : top + h, left : left + w] += weight
    return total.div_(weights).to(x.dtype)


def fade(length: int, border: int, *, at_start: bool, at_end: bool) -> Tensor:
    """Return weights (length,): 1 inside, falling linearly to 1 / border towards the chosen ends."""
    rising = (torch.arange(1, length + 1, **HOST) / max(border, 1)).clamp(max=1.0)
    weights = torch.ones(length, **HOST)
    if at_start:
        weights = weights * rising
    if at_end:
        weights = weights * rising.flip(0)
    return weights
