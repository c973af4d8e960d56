"""Reference images in the sequence of tokens, as FLUX.1-Kontext reads them.

Letters: b batch, n image tokens, m reference tokens, h and w of latents.
Source: black-forest-labs/flux 802fb47, src/flux/sampling.py, prepare_kontext and denoise. There they come after the
image's own tokens, here before them. The result is the same, since attention sees the order only through positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flux_batch.model.sampling import Velocity


class Reference(NamedTuple):
    """A reference image: its height and width in latents, and the position of its first token."""

    height: int
    width: int
    row: int = 0
    col: int = 0


class WithReferences:
    """A velocity whose model reads the tokens of reference images before those of the image.

    tokens: (b, m, in_channels), the same at every step: they are never noised.
    """

    def __init__(self, velocity: Velocity, tokens: Tensor) -> None:
        self._velocity = velocity
        self._tokens = tokens

    def __call__(self, step: int, img: Tensor) -> Tensor:
        """Return the velocity of the image's own tokens: (b, n, out_channels)."""
        return self._velocity(step, torch.cat((self._tokens, img), dim=1))[:, -img.shape[1] :]


def placed(sizes: Sequence[tuple[int, int]]) -> tuple[Reference, ...]:
    """Return references of these sizes, each placed beside or below those before it.

    sizes: height and width in latents.

    Kontext was trained on references pasted into one image. Each goes to the side where that image stays smaller.
    Source: Comfy-Org/ComfyUI a125cd8, comfy/ldm/flux/model.py, the method `offset`.
    """
    found: list[Reference] = []
    used_height = used_width = 0
    for height, width in sizes:
        row, col = (0, used_width) if used_height + height > used_width + width else (used_height, 0)
        used_height, used_width = max(used_height, row + height), max(used_width, col + width)
        # Positions count tokens; a token is two latents wide and high.
        found.append(Reference(height, width, (row + 1) // 2, (col + 1) // 2))
    return tuple(found)
