"""Inpainting with a model that reads no mask: after every step the area outside the mask is restored.

Source: diffusers 0.42.1, FluxInpaintPipeline. Letters: b batch, n packed tokens, c their channels, s pixels a latent.
"""

from __future__ import annotations

from torch import Tensor

from flux_batch.model.sampling import add_noise, pack


def latent_mask(mask: Tensor, num_channels: int, downscale: int) -> Tensor:
    """Return a mask of pixels as one of packed latents: (b, 1, 2 s h, 2 s w) -> (b, h w, 4 num_channels).

    A latent takes the value of its first pixel, as in nearest-neighbour resizing.
    """
    return pack(mask[:, :, ::downscale, ::downscale].expand(-1, num_channels, -1, -1))


class KeptLatents:
    """The latents of an image, restored after each step where its mask is 0.

    Noise is added to them up to the noise level of that step.
    latents, noise, mask: (b, n, c) packed; mask is 1 where the image is repainted. sigmas: (steps + 1,).
    """

    def __init__(self, latents: Tensor, noise: Tensor, mask: Tensor, sigmas: Tensor) -> None:
        self._latents = latents
        self._noise = noise
        self._mask = mask
        self._sigmas = sigmas

    def __call__(self, step: int, img: Tensor) -> Tensor:
        """Return the latents after a step, with the kept ones restored."""
        kept = add_noise(self._latents, self._noise, self._sigmas[step + 1])
        return (1 - self._mask) * kept + self._mask * img
