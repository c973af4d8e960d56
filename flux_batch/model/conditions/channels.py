"""Conditions in the channels of each image token, for Fill, Canny and Depth.

Letters: b batch, n image tokens, h and w of the packed latents, c channels of a condition, s pixels along a latent.
Source: black-forest-labs/flux 802fb47, src/flux/sampling.py, prepare_fill, prepare_control and denoise.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from flux_batch.model.sampling import Velocity, on_device, pack


class WithChannels:
    """A velocity whose model reads a condition in the channels of each token.

    The channels of the condition come after the noisy ones.
    condition: (b, n, c), the same at every step: it is never noised.
    """

    def __init__(self, velocity: Velocity, condition: Tensor) -> None:
        self._velocity = velocity
        self._condition = condition

    def __call__(self, step: int, img: Tensor) -> Tensor:
        """Return the velocity of the noisy channels: (b, n, out_channels)."""
        return self._velocity(step, torch.cat((img, self._condition), dim=-1))


def pack_mask(mask: Tensor, downscale: int) -> Tensor:
    """Return a mask as token channels, each pixel in its token: (b, 1, 2 s h, 2 s w) -> (b, h w, 4 s s).

    The pixels of a latent become its channels, row by row, and are then packed like latents.
    """
    pixels = rearrange(mask, "b 1 (h y) (w x) -> b (y x) h w", y=downscale, x=downscale)
    return pack(pixels)


def fill_channels(masked_latents: Tensor, mask: Tensor, downscale: int) -> Tensor:
    """Return Fill's condition: masked latents (b, z, 2h, 2w), then the mask, 1 where it repaints: (b, h w, c)."""
    channels = on_device(pack_mask(mask, downscale).to(masked_latents.dtype), masked_latents.device)
    return torch.cat((pack(masked_latents), channels), dim=-1)
