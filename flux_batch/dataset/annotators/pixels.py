"""Annotators without a model: a perceptual hash, sharpness and exposure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

_Luma: TypeAlias = NDArray[np.float64]

# As in imagehash's phash (JohannesBuchner/imagehash, imagehash/__init__.py): low frequencies of a small grey image.
_HASH_SIDE, _FREQUENCIES = 32, 8
# 8-bit levels. Below and above these, a pixel counts as black or white.
_DARK_BELOW, _BRIGHT_ABOVE = 8, 247
# An image whose levels vary less than this, as a standard deviation, is blank.
_BLANK_BELOW = 2.0


class PerceptualHash:
    """The perceptual hash of each image, 16 hexadecimal digits; similar images differ in few of its 64 bits."""

    version = "1"
    columns = pa.schema([("phash", pa.string())])

    def __call__(self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the hashes."""
        return {"phash": [_phash(image) for image in images]}


class Sharpness:
    """The sharpness of each image: the variance of its Laplacian, in squared 8-bit levels; low means blurred."""

    version = "1"
    columns = pa.schema([("sharpness", pa.float32())])

    def __call__(self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the variances."""
        return {"sharpness": [float(_laplacian(_luma(image)).var()) for image in images]}


class Exposure:
    """The mean and spread of an image's levels, and its shares of black and white.

    Levels are from 0 to 255. `is_blank` is true for an image of one colour.
    """

    version = "1"
    columns = pa.schema(
        [
            ("mean_level", pa.float32()),
            ("level_spread", pa.float32()),
            ("dark_share", pa.float32()),
            ("bright_share", pa.float32()),
            ("is_blank", pa.bool_()),
        ]
    )

    def __call__(self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the columns."""
        levels = [_luma(image) for image in images]
        spreads = [float(np.asarray(image, dtype=np.float64).std(axis=(0, 1)).max()) for image in images]
        return {
            "mean_level": [float(each.mean()) for each in levels],
            "level_spread": spreads,
            "dark_share": [float((each < _DARK_BELOW).mean()) for each in levels],
            "bright_share": [float((each > _BRIGHT_ABOVE).mean()) for each in levels],
            "is_blank": [spread < _BLANK_BELOW for spread in spreads],
        }


def _phash(image: Image.Image) -> str:
    small = image.convert("L").resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.LANCZOS)
    cosines = _cosines()
    low = cosines @ np.asarray(small, dtype=np.float64) @ cosines.T
    bits = np.packbits((low > np.median(low)).ravel())
    return bits.tobytes().hex()


@cache
def _cosines() -> _Luma:
    """Return the rows of the discrete cosine transform, type 2, for the lowest frequencies."""
    frequency, position = np.arange(_FREQUENCIES)[:, None], np.arange(_HASH_SIDE)[None, :]
    return np.asarray(np.cos(np.pi * frequency * (2 * position + 1) / (2 * _HASH_SIDE)), dtype=np.float64)


def _luma(image: Image.Image) -> _Luma:
    return np.asarray(image.convert("L"), dtype=np.float64)


def _laplacian(levels: _Luma) -> _Luma:
    """Return the Laplacian of levels (h w), with the edges repeated."""
    padded = np.pad(levels, 1, mode="edge")
    neighbours = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return np.asarray(neighbours - 4 * levels)
