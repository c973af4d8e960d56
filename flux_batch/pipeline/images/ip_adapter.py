"""Image prompts of an IP-Adapter: image tokens attend to tokens from CLIP's embedding of the prompts.

Letters: b batch, k image prompts of one image, e width of CLIP's embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux_batch.download.models import PathOrFolder, local_path
from flux_batch.errors import InvalidSetting
from flux_batch.model.checkpoint.checkpoint import Checkpoint, open_checkpoint
from flux_batch.model.checkpoint.image_prompts import ip_adapter_files
from flux_batch.model.conditions.ip_adapter import IPAdapter, load_ip_adapter
from flux_batch.model.conditions.vision import ClipVisionEncoder, load_clip_vision
from flux_batch.model.params import FluxParams
from flux_batch.model.sampling import HOST
from flux_batch.model.transformer import ImagePrompt
from flux_batch.pipeline.errors import checkpoint_errors, device_errors
from flux_batch.pipeline.images.memory import ImageMemory
from flux_batch.pipeline.images.pixels import converted
from flux_batch.sampling_params import check_number

# CLIP's normalization: transformers 5.23, image_utils.py, OPENAI_CLIP_MEAN and OPENAI_CLIP_STD.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# The largest aspect ratio that is resized as a whole; only the square in the middle is read.
_MAX_RATIO = 16


class IPAdapterPrompts:
    """The IP-Adapter of a pipeline with its vision tower, and a cache of image embeddings."""

    def __init__(self, encoder: ClipVisionEncoder, adapter: IPAdapter, num_heads: int) -> None:
        self.encoder = encoder
        self.adapter = adapter
        self._num_heads = num_heads
        self._memory = ImageMemory()
        self.set_scale(1.0)

    def set_scale(self, scale: float | Sequence[float]) -> None:
        """Set the strength, a factor of every image's weight: one number, or one for each double block.

        Raises: the errors of `block_scales`.
        """
        self._scale = self.block_scales(scale)

    def block_scales(self, scale: float | Sequence[float]) -> list[float]:
        """Return the strength at each double block. Raises: InvalidSetting unless it is a number, or one for each."""
        depth = self.adapter.params.depth
        scales = list(scale) if isinstance(scale, Sequence) else [scale] * depth
        for each in scales:
            check_number("scale", each)
        if len(scales) != depth:
            raise InvalidSetting(f"scale: {len(scales)} values for {depth} double blocks", field="scale")
        return scales

    def embeds(self, images: Sequence[Sequence[Image.Image]]) -> Tensor:
        """Return the embeddings of b lists of k image prompts: (b, k, e). Raises: InvalidSetting."""
        pixels = torch.stack([clip_pixels(image, self.encoder.side) for each in images for image in each])
        return self._memory.encoded(pixels, self.encoder).unflatten(0, (len(images), -1))

    def negative_embeds(self, embeds: Tensor) -> Tensor:
        """Return embeddings of black images in the same shape, for negative prompts, as in diffusers."""
        return self.embeds([[Image.new("RGB", (1, 1))]]).to(embeds).expand_as(embeds)

    def prompt(self, embeds: Tensor, scales: Sequence[Sequence[float]]) -> ImagePrompt:
        """Return the keys and values of embeddings (b, k, e), each with its scale."""
        return self.adapter.prompt(embeds, self._num_heads, self._scale, torch.tensor(scales, **HOST).to(embeds))


def load_ip_adapter_prompts(
    uris: Sequence[PathOrFolder],
    image_encoder: PathOrFolder | None,
    *,
    base: FluxParams,
    dtype: torch.dtype,
    device: torch.device,
    storage_options: Mapping[str, Any] | None = None,
) -> list[IPAdapterPrompts]:
    """Load IP-Adapters with their vision towers, for a transformer with these parameters.

    Raises: CheckpointError for files that are missing or do not fit; StoreError.
    """
    with checkpoint_errors():
        given = None if image_encoder is None else local_path(image_encoder, storage_options)
        files = [ip_adapter_files(local_path(uri, storage_options), given) for uri in uris]
        found = [(open_checkpoint(file), open_checkpoint(tower)) for file, tower in files]
    return ip_adapter_prompts(found, base=base, dtype=dtype, device=device)


def ip_adapter_prompts(
    found: Sequence[tuple[Checkpoint, Checkpoint]], *, base: FluxParams, dtype: torch.dtype, device: torch.device
) -> list[IPAdapterPrompts]:
    """Build IP-Adapters from their files; a vision tower that several share is loaded once.

    Raises: CheckpointError.
    """
    encoders: dict[str, ClipVisionEncoder] = {}
    adapters = []
    for checkpoint, tower in found:
        with checkpoint_errors(), device_errors():
            adapter = load_ip_adapter(checkpoint, dtype=dtype, device=device)
            if tower.source not in encoders:
                encoders[tower.source] = load_clip_vision(tower, dtype=dtype, device=device)
            encoder = encoders[tower.source]
            for what, value, wanted in (
                ("double blocks", adapter.params.depth, base.depth),
                ("keys of width", adapter.params.hidden_size, base.hidden_size),
                ("embeddings of width", adapter.params.embed_dim, encoder.width),
            ):
                if value != wanted:
                    raise ValueError(f"{checkpoint.source}: it has {what} {value}, where the others have {wanted}")
        adapters.append(IPAdapterPrompts(encoder, adapter, base.num_heads))
    return adapters


def clip_pixels(image: Image.Image, side: int) -> Tensor:
    """Return the middle of an image as CLIP reads it: fp32 (3, side, side).

    Its shorter side is resized by Pillow's bicubic filter, as CLIP's own preprocessing does. Raises: InvalidSetting.
    """
    image = _middle(converted(image, "image_prompt"))
    width, height = image.size
    shorter = min(width, height)
    size = (side * width // shorter, side * height // shorter)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    box = left, top, left + side, top + side
    array = np.asarray(image.resize(size, Image.Resampling.BICUBIC).crop(box), dtype=np.float32) / 255.0
    return torch.from_numpy((array - np.array(_MEAN, np.float32)) / np.array(_STD, np.float32)).permute(2, 0, 1)


def _middle(image: Image.Image) -> Image.Image:
    """Return the middle of a very long image: resizing it whole would take gigabytes."""
    longest = _MAX_RATIO * min(image.size)
    width, height = (min(each, longest) for each in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
