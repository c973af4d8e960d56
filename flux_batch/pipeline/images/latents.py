"""Input images of a call as latents: to start from, to keep, and as conditions.

Letters: b batch, z latent channels, h and w of the latents, n packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux_batch.errors import InvalidSetting
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.conditions.channels import WithChannels, fill_channels
from flux_batch.model.conditions.inpaint import KeptLatents, latent_mask
from flux_batch.model.conditions.reference import Reference, WithReferences, placed
from flux_batch.model.conditions.variant import FILL, KONTEXT, Variant
from flux_batch.model.optimize.tiling import Tiling, tiled_decode, tiled_moments
from flux_batch.model.sampling import Velocity, add_noise, make_generators, make_noise, on_device, pack
from flux_batch.pipeline.images.inputs import ImageInputs, keeps_latents
from flux_batch.pipeline.images.memory import ImageMemory
from flux_batch.pipeline.images.pixels import to_mask_pixels, to_pixels
from flux_batch.pipeline.request import PipelineRequest

# As in diffusers, called with the pipeline, the step, its timestep, and {"latents": (b, n, 4z)}; it may return others.
StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]
_AfterStep = Callable[[int, Tensor], Tensor]


class _Start(NamedTuple):
    """The latents that denoising starts from, and the noise and image in them: each (b, z, h, w).

    image: None if the latents are pure noise.
    """

    latents: Tensor
    noise: Tensor
    image: Tensor | None


class _Conditions(NamedTuple):
    """The conditions of a call beside its texts, the same at every step; None for those that it lacks.

    channels: (b, n, c), appended to the noisy channels. references: (b, m, 4z), tokens before those of the image.
    """

    channels: Tensor | None
    references: Tensor | None

    def around(self, velocity: Velocity) -> Velocity:
        """Return the velocity of a model that reads these conditions."""
        velocity = velocity if self.references is None else WithReferences(velocity, self.references)
        return velocity if self.channels is None else WithChannels(velocity, self.channels)


class ImageLatents:
    """The autoencoder with its conversions between images and latents. The model computes in `dtype` on `device`."""

    def __init__(self, autoencoder: AutoEncoder, device: torch.device, dtype: torch.dtype) -> None:
        self.autoencoder = autoencoder
        self._device = device
        self._dtype = dtype
        self._memory = ImageMemory()

    def start(self, request: PipelineRequest, variant: Variant, sigma: Tensor) -> _Start:
        """Return the latents that denoising starts from: noise, or the input images at noise level `sigma`."""
        p, size = self.autoencoder.params, (request.shared.height, request.shared.width)
        shape = (p.z_channels, *(side // p.downscale for side in size))
        generators = make_generators(request.seeds)
        if request.images.input_image is None:
            noise = self._as_latents(make_noise(shape, generators))
            return _Start(noise, noise, None)
        # The posterior is sampled before the noise, from the same generator, as in diffusers. DiffSynth and diffusers'
        # pipelines for Kontext take its mean.
        takes_mean = request.shared.sigma_shift is not None or variant is KONTEXT
        posterior = None if takes_mean else make_noise(shape, generators)
        noise = self._as_latents(make_noise(shape, generators))
        image = self.encode(self._pixels(request.images.input_image, "input_image", request), request.tiling, posterior)
        return _Start(add_noise(image, noise, sigma), noise, image)

    def conditions(self, request: PipelineRequest, variant: Variant) -> _Conditions:
        """Return the conditions that a variant reads from the images of a call."""
        return _Conditions(self._channels(request, variant), self._references(request))

    def control(self, request: PipelineRequest, place: int, *, as_pixels: bool, with_mask: bool) -> Tensor:
        """Return control images as a ControlNet reads them: those at index `place` of each image's list.

        as_pixels: (b, 3, 8h, 8w) in [-1, 1]; else packed latents (b, n, c) of the posterior's mean. with_mask: the
        image is black where the mask repaints, and the inverted mask is one more latent channel.
        """
        images = [each[place] for each in request.images.control_image or ()]
        pixels = self._pixels(images, "control_image", request)
        if as_pixels:
            return self._as_latents(pixels)
        if not with_mask:
            return pack(self.encode(pixels, request.tiling))
        mask, p = self.masks(request), self.autoencoder.params
        latents = pack(self.encode(torch.where(mask > 0, -1.0, pixels), request.tiling))
        return torch.cat((latents, self._as_latents(1 - latent_mask(mask, 1, p.downscale))), dim=-1)

    def _channels(self, request: PipelineRequest, variant: Variant) -> Tensor | None:
        """Return a variant's condition in the channels of each token, beside the noise: (b, n, c), or None.

        It is always the mean of the posterior, as in BFL's code, so that an image depends only on its row.
        """
        inputs = request.images
        if inputs.control_image is not None and variant.channels == 2:
            control = self._pixels([images[0] for images in inputs.control_image], "control_image", request)
            return pack(self.encode(control, request.tiling))
        if variant is not FILL or inputs.input_image is None:
            return None
        mask = self.masks(request)
        pixels = self._pixels(inputs.input_image, "input_image", request)
        masked = pixels * (1 - mask)  # the area to repaint is 0, mid-grey
        return fill_channels(self.encode(masked, request.tiling), mask, self.autoencoder.params.downscale)

    def _references(self, request: PipelineRequest) -> Tensor | None:
        """Return the tokens of the reference images, one after the other: (b, m, 4z), or None.

        Each image is encoded alone, as the mean of the posterior, as in diffusers.
        """
        images = request.images.reference_image
        if not images or not request.images.reference_sizes:
            return None
        pixels = (torch.stack([to_pixels(each, *each.size) for each in column]) for column in zip(*images, strict=True))
        return torch.cat([pack(self.encode(each, request.tiling)) for each in pixels], dim=1)

    def places(self, request: PipelineRequest) -> tuple[Reference, ...]:
        """Return the sizes and positions of the reference images' latents."""
        downscale = self.autoencoder.params.downscale
        return placed([(h // downscale, w // downscale) for w, h in request.images.reference_sizes])

    def kept(self, request: PipelineRequest, variant: Variant, start: _Start, sigmas: Tensor) -> KeptLatents | None:
        """Return the object that restores latents outside a mask after each step; None without a mask or for Fill."""
        if start.image is None or not keeps_latents(request.images, variant):
            return None
        p = self.autoencoder.params
        mask = latent_mask(self.masks(request), p.z_channels, p.downscale)
        return KeptLatents(pack(start.image), pack(start.noise), self._as_latents(mask), sigmas)

    def masks(self, request: PipelineRequest) -> Tensor:
        """Return the masks of a call, 1 where they repaint: (b, 1, 8h, 8w) fp32 on the CPU."""
        size = request.shared.width, request.shared.height
        return torch.stack([to_mask_pixels(mask, *size) for mask in request.images.mask_image or ()])

    def encode(self, pixels: Tensor, tiling: Tiling | None, noise: Tensor | None = None) -> Tensor:
        """Return scaled latents in the model's dtype: (b, 3, 8h, 8w) in [-1, 1] on the CPU -> (b, z, h, w).

        Each image is encoded alone, and recent results are cached. noise: to sample the posterior; None takes its mean.
        """
        weight = self.autoencoder.encoder.conv_in.weight

        def moments(image: Tensor) -> Tensor:
            image = on_device(image.to(weight.dtype), weight.device)
            return tiled_moments(self.autoencoder, image, tiling) if tiling else self.autoencoder.encoder(image)

        found = self._memory.encoded(pixels, moments, tiling)
        noise = None if noise is None else on_device(noise.to(weight.dtype), weight.device)
        return self.autoencoder.sample(found, noise).to(self._dtype)

    def decode(self, latents: Tensor, tiling: Tiling | None = None) -> Tensor:
        """Return pixels, about [-1, 1], in the autoencoder's dtype: (b, z, h, w) -> (b, 3, 8h, 8w)."""
        latents = latents.to(self.autoencoder.decoder.conv_in.weight)
        return tiled_decode(self.autoencoder, latents, tiling) if tiling else self.autoencoder.decode(latents)

    def paste_back(self, pixels: Tensor, request: PipelineRequest) -> Tensor:
        """Return pixels with those of the input images where a mask is 0.

        Converted to uint8, these pixels equal the resized input image bit for bit.
        """
        inputs: ImageInputs = request.images
        if inputs.mask_image is None or inputs.input_image is None:
            return pixels
        source = on_device(self._pixels(inputs.input_image, "input_image", request), pixels.device)
        return torch.where(on_device(self.masks(request), pixels.device) > 0, pixels.float(), source)

    def _pixels(self, images: Sequence[Image.Image], name: str, request: PipelineRequest) -> Tensor:
        size = request.shared.width, request.shared.height
        return torch.stack([to_pixels(image, *size, name) for image in images])

    def _as_latents(self, latents: Tensor) -> Tensor:
        return on_device(latents.to(self._dtype), self._device)


def after_each_step(
    kept: KeptLatents | None, callback: StepCallback | None, pipeline: Any, sigmas: Tensor
) -> _AfterStep | None:
    """Return a function that changes latents after each step, or None.

    It first restores what a mask keeps, then calls the callback, in diffusers' order
    (pipelines/flux/pipeline_flux_inpaint.py).
    """
    if callback is None:
        return kept

    def after_step(step: int, img: Tensor) -> Tensor:
        img = img if kept is None else kept(step, img)
        return _latents_of(callback(pipeline, step, 1000.0 * sigmas[step], {"latents": img}), img)

    return after_step


def _latents_of(returned: Any, img: Tensor) -> Tensor:
    """Return the latents that a callback returned, in the dtype of `img`; `img` itself if it returned none.

    Raises: InvalidSetting for anything that cannot be used as latents.
    """
    name = "callback_on_step_end"
    if returned is None:
        return img
    if not isinstance(returned, Mapping):
        what = type(returned).__name__
        raise InvalidSetting(f"{name} returned a {what}: must be None, or latents by name", field=name)
    latents = returned.get("latents")
    if latents is None:
        return img
    shape = tuple(np.shape(latents))
    if shape != img.shape:
        raise InvalidSetting(f"{name} returned latents {list(shape)}: must be {list(img.shape)}, as given", field=name)
    return torch.as_tensor(latents, dtype=img.dtype, device=img.device)
