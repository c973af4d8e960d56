"""Images as prompts of an IP-Adapter: image tokens attend to what CLIP sees in them.

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
from flux_batch.images import to_rgb
from flux_batch.model.checkpoint.checkpoint import Checkpoint, open_checkpoint
from flux_batch.model.checkpoint.image_prompts import ip_adapter_files
from flux_batch.model.conditions.ip_adapter import IPAdapter, load_ip_adapter
from flux_batch.model.conditions.vision import ClipVisionEncoder, load_clip_vision
from flux_batch.model.params import FluxParams
from flux_batch.model.transformer import ImagePrompt
from flux_batch.pipeline.errors import checkpoint_errors, device_errors
from flux_batch.pipeline.images.memory import ImageMemory
from flux_batch.sampling_params import check_number

# Those of CLIP: transformers 5.23, image_utils.py, OPENAI_CLIP_MEAN and OPENAI_CLIP_STD.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class IPAdapterPrompts:
    """The IP-Adapter of a pipeline with its vision tower; remembers the embeddings of the last images."""

    def __init__(
        self, encoder: ClipVisionEncoder, adapter: IPAdapter, num_heads: int, scale: float | Sequence[float] = 1.0
    ) -> None:
        """Take both parts; scale: of every image, beside its own weight, or one for each double block."""
        self.encoder = encoder
        self.adapter = adapter
        self._num_heads = num_heads
        self._memory = ImageMemory()
        self.set_scale(scale)

    def set_scale(self, scale: float | Sequence[float]) -> None:
        """Set the strength of the adapter. Raises: InvalidSetting for no number, or not one for each block."""
        depth = self.adapter.params.depth
        scales = list(scale) if isinstance(scale, Sequence) else [scale] * depth
        for each in scales:
            check_number("scale", each)
        if len(scales) != depth:
            raise InvalidSetting(f"scale: {len(scales)} values for {depth} double blocks", field="scale")
        self._scale = scales

    def prompt(self, images: Sequence[Sequence[Image.Image]], scales: Sequence[Sequence[float]]) -> ImagePrompt:
        """Return what is read beside the prompts of a call: as many images, with their scales, for each."""
        pixels = torch.stack([_pixels(image, self.encoder.side) for each in images for image in each])
        embeds = self._memory.encoded(pixels, self.encoder)
        weights = torch.tensor(scales).to(embeds)
        return self.adapter.prompt(embeds.view(*weights.shape, -1), self._num_heads, self._scale, weights)

    def negative_prompt(self, scales: Sequence[Sequence[float]]) -> ImagePrompt:
        """Return what is read beside the negative prompts: as many images, each of them black, as in diffusers."""
        black = Image.new("RGB", (1, 1))
        return self.prompt([[black] * len(each) for each in scales], scales)


def load_ip_adapter_prompts(
    uri: PathOrFolder,
    image_encoder: PathOrFolder | None,
    scale: float | Sequence[float],
    *,
    base: FluxParams,
    dtype: torch.dtype,
    device: torch.device,
    storage_options: Mapping[str, Any] | None = None,
) -> IPAdapterPrompts:
    """Load an IP-Adapter with its vision tower, for a transformer of these parameters.

    Raises: CheckpointError for files that are missing or do not fit; StoreError; InvalidSetting for the scale.
    """
    with checkpoint_errors():
        given = None if image_encoder is None else local_path(image_encoder, storage_options)
        adapter, tower = map(open_checkpoint, ip_adapter_files(local_path(uri, storage_options), given))
    return ip_adapter_prompts(adapter, tower, scale, base=base, dtype=dtype, device=device)


def ip_adapter_prompts(
    checkpoint: Checkpoint,
    tower: Checkpoint,
    scale: float | Sequence[float] = 1.0,
    *,
    base: FluxParams,
    dtype: torch.dtype,
    device: torch.device,
) -> IPAdapterPrompts:
    """Build an IP-Adapter with its vision tower of their files. Raises: the errors of `load_ip_adapter_prompts`."""
    with checkpoint_errors(), device_errors():
        adapter = load_ip_adapter(checkpoint, dtype=dtype, device=device)
        encoder = load_clip_vision(tower, dtype=dtype, device=device)
        for what, value, wanted in (
            ("double blocks", adapter.params.depth, base.depth),
            ("keys of width", adapter.params.hidden_size, base.hidden_size),
            ("embeddings of width", adapter.params.embed_dim, encoder.width),
        ):
            if value != wanted:
                raise ValueError(f"{checkpoint.source}: it has {what} {value}, where the others have {wanted}")
    return IPAdapterPrompts(encoder, adapter, base.num_heads, scale)


def _pixels(image: Image.Image, side: int) -> Tensor:
    """Return the middle of an image as CLIP reads it: fp32 (3, side, side).

    Its shorter side is resized by Pillow's bicubic filter, as CLIP's own preprocessing does. Raises: InvalidSetting.
    """
    if not isinstance(image, Image.Image):
        raise InvalidSetting(f"image_prompt is a {type(image).__name__}: must be a PIL image", field="image_prompt")
    width, height = image.size
    shorter = min(width, height)
    size = (side * width // shorter, side * height // shorter)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    box = left, top, left + side, top + side
    array = np.asarray(to_rgb(image).resize(size, Image.Resampling.BICUBIC).crop(box), dtype=np.float32) / 255.0
    return torch.from_numpy((array - np.array(_MEAN, np.float32)) / np.array(_STD, np.float32)).permute(2, 0, 1)
