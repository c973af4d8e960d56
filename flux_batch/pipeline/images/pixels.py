"""Conversions between images and the pixel tensors of the autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux_batch.errors import InvalidSetting, RowError, one_line
from flux_batch.images import to_mask, to_rgb
from flux_batch.model.sampling import normal_tensor

OutputType = Literal["pil", "np", "pt", "latent"]


def to_pixels(image: Image.Image, width: int, height: int, name: str = "input_image") -> Tensor:
    """Return the pixels of an image: fp32 (3, height, width) in [-1, 1], resized by Lanczos.

    Raises: InvalidSetting for anything but a PIL image that can be shown in RGB; `name` is its argument.
    """
    array = np.asarray(resized(image, width, height, name, to_rgb), dtype=np.float32)
    return torch.from_numpy(array / 255.0 * 2.0 - 1.0).permute(2, 0, 1)


def to_mask_pixels(mask: Image.Image, width: int, height: int) -> Tensor:
    """Return a mask as pixels: fp32 (1, height, width), 1 where it repaints, else 0; resized by Lanczos.

    Pixels from mid-grey on are repainted, as in diffusers. Raises: like `to_pixels`.
    """
    array = np.asarray(resized(mask, width, height, "mask_image", to_mask), dtype=np.uint8)
    return torch.from_numpy((array > 127).astype(np.float32))[None]


def resized(
    image: Image.Image, width: int, height: int, name: str, convert: Callable[[Image.Image], Image.Image] = to_rgb
) -> Image.Image:
    """Return an image converted by `convert` and resized by Lanczos. Raises: InvalidSetting, like `to_pixels`."""
    return converted(image, name, convert).resize((width, height), Image.Resampling.LANCZOS)


def converted(image: Image.Image, name: str, convert: Callable[[Image.Image], Image.Image] = to_rgb) -> Image.Image:
    """Return an image converted by `convert`. Raises: InvalidSetting, like `to_pixels`."""
    if not isinstance(image, Image.Image):
        raise InvalidSetting(f"{name} is a {type(image).__name__}: must be a PIL image", field=name)
    if not all(image.size):
        raise InvalidSetting(f"{name} is {image.width} x {image.height} pixels: must have some", field=name)
    try:
        return convert(image)
    except RowError as error:
        raise InvalidSetting(f"{name} {error}", field=name) from error
    except (OSError, ValueError) as error:  # Pillow reads the file only now: it is cut short or closed
        raise InvalidSetting(f"{name} cannot be read: {one_line(error)}", field=name) from error


def as_output(pixels: Tensor, output_type: OutputType, decoded: Tensor, dtype: torch.dtype) -> Any:
    """Return pixels in the output type of a call: a tensor for `pt`, else a list of arrays or PIL images.

    decoded: the pixels before the input image was pasted back; dtype: of the model, for the message. Raises: RowError
    if `decoded` holds NaN or infinity, which uint8 would turn into black.
    """
    is_finite = torch.isfinite(decoded).all()
    if output_type == "pt":
        images = pixels.float().clamp(-1.0, 1.0)
    else:
        images = to_uint8(pixels).to("cpu", non_blocking=pixels.is_cuda)
    # The host waits for the GPU here, only once: all earlier work has then finished, too.
    if not is_finite:
        instead = "use bfloat16 or float32" if dtype == torch.float16 else "lower its guidance or the scales of LoRAs"
        raise RowError(f"the model overflowed in {str(dtype).removeprefix('torch.')}: {instead}")
    if output_type == "pt":
        return normal_tensor(images)
    arrays = list(images.numpy())
    return [Image.fromarray(array) for array in arrays] if output_type == "pil" else arrays


def to_uint8(pixels: Tensor) -> Tensor:
    """Return pixels as uint8: (b, 3, height, width) in [-1, 1] -> (b, height, width, 3), rounded half to even.

    They are clamped in their dtype and rounded in fp32, as in diffusers; BFL and DiffSynth truncate.
    """
    unit = (pixels * 0.5 + 0.5).clamp(0.0, 1.0).float()
    return (unit * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)
