"""A transformer for one denoising loop: what does not change with the image is computed once; knows no schedule.

Letters: b batch, l text tokens, n image tokens, s steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flux_batch.model.params import MODULATION_ROWS, MODULATION_ROWS_ON_CPU
from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Flux, Modulations

# Of FLUX.1 at 1024 x 1024 with 512 text tokens one takes 2.4 MB, at 2048 x 2048 8.7 MB.
MAX_TABLES = 8


class Conditioning(NamedTuple):
    """What the text encoders say of each prompt: txt (b, l, context) T5 states, y (b, vec) CLIP pooled."""

    txt: Tensor
    y: Tensor


class ConditionedFlux:
    """A Flux that knows its texts and steps: call it with each step in turn.

    pe: `position_table` of text then image; timesteps: (s,) in [0, 1]; guidance: (b,), unused by a model without its
    embedder. All as `Flux.forward` takes them, which does the same but for the order of sums in modulation.
    """

    def __init__(
        self, model: Flux, text: Conditioning, pe: Tensor, timesteps: Tensor, guidance: Tensor | None = None
    ) -> None:
        self.model = model
        self.pe = pe
        self.txt = model.txt_in(text.txt)
        self.num_steps = len(timesteps)
        self._y = text.y
        self._timesteps = timesteps
        self._guidance = guidance
        self._steps = range(0)
        self._modulations: Modulations | None = None

    def __call__(self, step: int, img: Tensor) -> Tensor:
        """Return the velocity (noise - data) of image tokens (b, n, in_channels): (b, n, out_channels)."""
        return self.model.velocity(img, self.txt, self.modulations(step), self.pe)

    def modulations(self, step: int) -> Modulations:
        """Return what modulates every block at a step, b rows; computed for some steps at once."""
        images = len(self._y)
        if self._modulations is None or step not in self._steps:
            rows = MODULATION_ROWS_ON_CPU if self._y.device.type == "cpu" else MODULATION_ROWS
            self._steps = range(step, min(step + max(1, rows // images), self.num_steps))
            self._modulations = self.model.modulations(self._conditioning())
        first = (step - self._steps.start) * images
        return self._modulations.of(slice(first, first + images))

    def _conditioning(self) -> Tensor:
        """Return the vectors of `_steps`, images within steps: (steps b, hidden)."""
        count = len(self._steps)
        timesteps = self._timesteps[self._steps.start : self._steps.stop].repeat_interleave(len(self._y))
        guidance = None if self._guidance is None else self._guidance.repeat(count)
        return self.model.conditioning(timesteps, self._y.repeat(count, 1), guidance)


def position_tables(
    model: Flux, device: torch.device, max_tables: int = MAX_TABLES
) -> Callable[[int, int, int], Tensor]:
    """Return what makes the table of each size once, and remembers the last ones on `device`.

    It takes the number of text tokens, height and width of the latents, and returns `position_table` of text, then of
    such latents: (l + n, head_dim / 2, 2) fp32.
    """

    @lru_cache(max_tables)
    def table(num_txt_tokens: int, height: int, width: int) -> Tensor:
        return model.position_table(position_ids(num_txt_tokens, height, width).to(device))

    return table
