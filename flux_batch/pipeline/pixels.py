"""Conversions between images and pixels of the autoencoder; knows no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux_batch.errors import InvalidSetting, RowError
from flux_batch.images import to_rgb


def check_finite(pixels: Tensor) -> None:
    """Raise RowError if an image holds NaN or infinity, which uint8 would turn into black."""
    if not torch.isfinite(pixels).all():
        raise RowError(f"the model overflowed in {str(pixels.dtype).removeprefix('torch.')}: use bfloat16 or float32")


def to_pixels(image: Image.Image, width: int, height: int) -> Tensor:
    """Return the pixels of an image: fp32 (3, height, width) in [-1, 1], resized by Lanczos.

    Raises: InvalidSetting for anything but a PIL image that can be shown in RGB.
    """
    if not isinstance(image, Image.Image):
        raise InvalidSetting(f"input_image is a {type(image).__name__}: must be a PIL image", field="input_image")
    try:
        rgb = to_rgb(image)
    except RowError as error:
        raise InvalidSetting(f"input_image {error}", field="input_image") from error
    array = np.asarray(rgb.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    return torch.from_numpy(array / 255.0 * 2.0 - 1.0).permute(2, 0, 1)


def to_uint8(pixels: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return pixels as uint8: (b, 3, height, width) in [-1, 1] -> (b, height, width, 3), rounded half to even.

    Clamped in the dtype of the pixels, then rounded in fp32, as diffusers does; BFL and DiffSynth truncate.
    """
    unit = (pixels * 0.5 + 0.5).clamp(0.0, 1.0).float()
    return (unit * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
