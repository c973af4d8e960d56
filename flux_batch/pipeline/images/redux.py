"""Image prompts of FLUX.1-Redux: each becomes tokens after those of the text.

Letters: b batch, p image prompts of an image to make, n patches of an image prompt, c width of the text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux_batch.download.models import PathOrFolder, local_path
from flux_batch.model.checkpoint.checkpoint import Checkpoint, open_checkpoint
from flux_batch.model.checkpoint.image_prompts import redux_files
from flux_batch.model.conditions.redux import Redux, load_redux
from flux_batch.model.conditions.vision import SiglipEncoder, load_siglip
from flux_batch.model.params import FluxParams
from flux_batch.model.sampling import HOST
from flux_batch.model.transformer import PromptEmbeds
from flux_batch.pipeline.errors import checkpoint_errors, device_errors
from flux_batch.pipeline.images.memory import ImageMemory
from flux_batch.pipeline.images.pixels import converted
from flux_batch.sampling_params import check_number


class ReduxPrompts:
    """The Redux of a pipeline with its vision tower, and a cache of image tokens."""

    def __init__(self, encoder: SiglipEncoder, redux: Redux, scale: float = 1.0) -> None:
        """Keep both parts. scale: a factor of every image's weight."""
        self.encoder = encoder
        self.redux = redux
        self._scale = scale
        self._memory = ImageMemory()

    def beside(
        self, texts: PromptEmbeds, images: Sequence[Sequence[Image.Image]], scales: Sequence[Sequence[float]]
    ) -> PromptEmbeds:
        """Return the embeddings of texts, followed by the tokens of their images: (b, l + p n, c).

        images: p for each text. Their tokens are multiplied by the image's scale and concatenated, as in ComfyUI;
        diffusers sums the tokens of several images instead.
        """
        tokens = []
        for place in range(len(images[0])):
            pixels = torch.stack([siglip_pixels(each[place], self.encoder.side) for each in images])
            found = self._memory.encoded(pixels, lambda image: self.redux(self.encoder(image)))
            scale = torch.tensor([self._scale * each[place] for each in scales], **HOST).to(found)
            tokens.append(found * scale[:, None, None])
        return PromptEmbeds(torch.cat((texts.prompt_embeds, *tokens), dim=1), texts.pooled_prompt_embeds)


def load_redux_prompts(
    uri: PathOrFolder,
    image_encoder: PathOrFolder | None,
    scale: float,
    *,
    base: FluxParams,
    dtype: torch.dtype,
    device: torch.device,
    storage_options: Mapping[str, Any] | None = None,
) -> ReduxPrompts:
    """Load a Redux with its vision tower, for a transformer with these parameters.

    Raises: CheckpointError for files that are missing or do not fit; StoreError; InvalidSetting for the scale.
    """
    with checkpoint_errors():
        given = None if image_encoder is None else local_path(image_encoder, storage_options)
        file, tower = redux_files(local_path(uri, storage_options), given)
        return redux_prompts(
            open_checkpoint(file), open_checkpoint(tower), scale, base=base, dtype=dtype, device=device
        )


def redux_prompts(
    checkpoint: Checkpoint,
    tower: Checkpoint,
    scale: float = 1.0,
    *,
    base: FluxParams,
    dtype: torch.dtype,
    device: torch.device,
) -> ReduxPrompts:
    """Build a Redux with its vision tower from their files. Raises: the errors of `load_redux_prompts`."""
    check_number("scale", scale)
    with checkpoint_errors(), device_errors():
        redux = load_redux(checkpoint, dtype=dtype, device=device)
        encoder = load_siglip(tower, dtype=dtype, device=device)
        for what, value, wanted in (
            ("makes tokens of", redux.context_in_dim, base.context_in_dim),
            ("reads states of", redux.redux_up.in_features, encoder.width),
        ):
            if value != wanted:
                raise ValueError(f"{checkpoint.source}: {what} width {value}, where the others have {wanted}")
    return ReduxPrompts(encoder, redux, scale)


def siglip_pixels(image: Image.Image, side: int) -> Tensor:
    """Return an image as the vision tower reads it: fp32 (3, side, side) in [-1, 1], ignoring its proportions.

    It is resized by Pillow's bicubic filter, as in SigLIP's own preprocessing. Raises: InvalidSetting.
    """
    square = converted(image, "image_prompt").resize((side, side), Image.Resampling.BICUBIC)
    array = np.asarray(square, dtype=np.float32) / 255.0
    return torch.from_numpy((array - 0.5) / 0.5).permute(2, 0, 1)
