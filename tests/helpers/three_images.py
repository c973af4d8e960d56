"""The inputs of three images for the tiny golden model: noise, texts and guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from flux_batch.model.sampling import position_ids, timesteps_of
from flux_batch.model.transformer import Denoiser, Flux, PromptEmbeds
from helpers.golden import tensor

NOISE = tensor("in.noise", (3, 24, 64), 1.7)
TEXT = PromptEmbeds(tensor("in.txt", (3, 7, 24)), tensor("in.vec", (3, 32)))
NEGATIVE = PromptEmbeds(tensor("in.negtxt", (3, 7, 24)), tensor("in.negvec", (3, 32)))
GUIDANCE = torch.tensor([3.5, 1.0, 8.0])


def denoiser(
    model: Flux,
    sigmas: Tensor,
    images: slice | list[int] = slice(None),
    text: PromptEmbeds = TEXT,
    size: tuple[int, int] = (8, 12),
) -> Denoiser:
    """Return a denoiser of `model` for some of the images, whose latents have the height and width `size`."""
    pe, guidance = model.position_table(position_ids(7, *size)), GUIDANCE[images].to(text.prompt_embeds.dtype)
    chosen = PromptEmbeds(*(part[images] for part in text))
    return Denoiser(model, chosen, pe, timesteps_of(sigmas, guidance), guidance)
