"""A transformer for one denoising loop, which computes once what does not change with the image; knows no schedule.

Letters: b batch, l text tokens, n image tokens, s steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Flux, Modulations

# A table of FLUX.1 takes 2.4 MB at 1024 x 1024 with 512 text tokens, 8.7 MB at 2048 x 2048.
_MAX_POSITION_TABLES = 8


class PromptEmbeds(NamedTuple):
    """The embeddings of some prompts, by the names of diffusers.

    prompt_embeds: (b, l, context), T5's states; pooled_prompt_embeds: (b, vec), CLIP's pooled embedding.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> PromptEmbeds:
        """Return the same on a device, in a dtype."""
        return PromptEmbeds(*(part.to(device, dtype) for part in self))


class ConditionedFlux:
    """A Flux with its texts and steps: call it with each step in turn.

    pe: `position_table` of text then image; timesteps: (s,) in [0, 1]; guidance: (b,), unused by a model without its
    embedder. It gives the velocities of `Flux.forward`, but for the order of sums in modulation.
    """

    def __init__(
        self, model: Flux, text: PromptEmbeds, pe: Tensor, timesteps: Tensor, guidance: Tensor | None = None
    ) -> None:
        self.model = model
        self.pe = pe
        self.txt = model.txt_in(text.prompt_embeds)
        self.num_steps = len(timesteps)
        self._y = text.pooled_prompt_embeds
        self._timesteps = timesteps
        self._guidance = guidance
        self._steps = range(0)
        self._modulations: Modulations | None = None

    def __call__(self, step: int, img: Tensor) -> Tensor:
        """Return the velocity (noise - data) of image tokens (b, n, in_channels): (b, n, out_channels)."""
        return self.model.velocity(img, self.txt, self.modulations(step), self.pe)

    def modulations(self, step: int) -> Modulations:
        """Return the modulation of all blocks at a step, b rows; computed for some steps at once."""
        images = len(self._y)
        if self._modulations is None or step not in self._steps:
            steps_at_once = max(1, self.model.modulation_rows // images)
            self._steps = range(step, min(step + steps_at_once, self.num_steps))
            self._modulations = self.model.modulations(self._conditioning())
        first = (step - self._steps.start) * images
        return self._modulations.select(slice(first, first + images))

    def _conditioning(self) -> Tensor:
        """Return the conditioning vectors of `_steps`, step by step: (steps b, hidden)."""
        count = len(self._steps)
        timesteps = self._timesteps[self._steps.start : self._steps.stop].repeat_interleave(len(self._y))
        guidance = None if self._guidance is None else self._guidance.repeat(count)
        return self.model.conditioning(timesteps, self._y.repeat(count, 1), guidance)


def position_tables(
    model: Flux, device: torch.device, max_tables: int = _MAX_POSITION_TABLES
) -> Callable[[int, int, int], Tensor]:
    """Return a function that makes the rotary table of each size once, and keeps the last ones on `device`.

    It takes the number of text tokens, height and width of the latents, and returns `position_table` of text, then of
    such latents: (l + n, head_dim / 2, 2) fp32.
    """

    @lru_cache(max_tables)
    def table(num_txt_tokens: int, height: int, width: int) -> Tensor:
        return model.position_table(position_ids(num_txt_tokens, height, width).to(device))

    return table
