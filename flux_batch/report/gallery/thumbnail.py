"""A small copy of a stored image, once its bytes are those that the metadata records."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from flux_batch.config.schema import ImageConfig
from flux_batch.images import encode
from flux_batch.sampling_params import MAX_SIDE

# Twice the width of a card of the page, for screens with two pixels a point.
LONGEST = 384
FORMATS = ("PNG", "JPEG", "WEBP")
WEBP = ImageConfig(type="webp", quality=85)


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """WebP, labelled as AI generated like what it shows; sides in pixels."""

    data: bytes
    width: int
    height: int


def make_thumbnail(data: bytes, row: Mapping[str, Any]) -> Thumbnail:
    """Shrink an image to LONGEST pixels a side, never enlarge it.

    Raises: ValueError that says why it cannot be shown: other bytes than recorded, no image, too large a one.
    """
    if hashlib.sha256(data).hexdigest() != row.get("sha256"):
        raise ValueError("it has other bytes than the metadata records")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if max(image.size) > MAX_SIDE:
                raise ValueError(f"it is larger than {MAX_SIDE} pixels a side")
            image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
            pixels = np.asarray(image.convert("RGB"))
    except ValueError:
        raise
    except Exception as error:  # whatever a decoder says; one image less is shown
        raise ValueError(f"it cannot be decoded ({type(error).__name__})") from error
    height, width, _ = pixels.shape
    return Thumbnail(encode(pixels, WEBP, {}), width, height)
