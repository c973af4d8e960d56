"""The FLUX transformer: packed image tokens and a text in, the velocity of each token out; knows no schedule.

Attribute names are the keys of the original checkpoints. Source of the layout: black-forest-labs/flux 802fb47,
src/flux/model.py. Letters: b batch, l text tokens, n image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flux_batch.model.layers import (
    SINUSOID_WIDTH,
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    SingleStreamBlock,
    timestep_embedding,
)
from flux_batch.model.params import MODULATION_ROWS, FluxParams
from flux_batch.model.rope import rotary_table


class Modulations(NamedTuple):
    """The modulation of all blocks, for some rows: each (rows, 1, a multiple of hidden)."""

    double: list[tuple[Tensor, Tensor]]
    single: list[Tensor]
    last: Tensor

    def select(self, rows: slice | list[int]) -> Modulations:
        """Return the modulation of some of the rows."""
        return self.map(lambda modulation: modulation[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> Modulations:
        """Return the results of `change` on each tensor."""
        double = [(change(img), change(txt)) for img, txt in self.double]
        return Modulations(double, [change(modulation) for modulation in self.single], change(self.last))

    def tensors(self) -> list[Tensor]:
        """Return all tensors, always in the same order."""
        return [*chain.from_iterable(self.double), *self.single, self.last]


class Flux(nn.Module):
    """The transformer. `modulation_rows`: rows of modulation to compute together, see `ConditionedFlux`."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        p = self.params = params
        self.modulation_rows = MODULATION_ROWS
        self.img_in = nn.Linear(p.in_channels, p.hidden_size)
        self.txt_in = nn.Linear(p.context_in_dim, p.hidden_size)
        self.time_in = MLPEmbedder(SINUSOID_WIDTH, p.hidden_size)
        self.vector_in = MLPEmbedder(p.vec_in_dim, p.hidden_size)
        self.guidance_in = MLPEmbedder(SINUSOID_WIDTH, p.hidden_size) if p.guidance_embed else None
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(p.hidden_size, p.num_heads, p.mlp_hidden_dim, p.qkv_bias) for _ in range(p.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(p.hidden_size, p.num_heads, p.mlp_hidden_dim) for _ in range(p.depth_single_blocks)
        )
        self.final_layer = LastLayer(p.hidden_size, p.out_channels)

    def forward(
        self, img: Tensor, txt: Tensor, pe: Tensor, timesteps: Tensor, y: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """Return the velocity (noise - data): (b, n, out_channels).

        The pipeline computes the same by ConditionedFlux and `velocity`, with the parts that do not change with the
        image computed once.
        img: (b, n, in_channels); txt: (b, l, context_in_dim) T5 states; pe: `position_table` of text then image;
        timesteps: (b,) in [0, 1], 1 is pure noise; y: (b, vec_in_dim) CLIP pooled; guidance: (b,), unused by a
        model without its embedder. All in the dtype of the weights. Raises: ValueError if it lacks its guidance.
        """
        modulations = self.modulations(self.conditioning(timesteps, y, guidance))
        return self.velocity(img, self.txt_in(txt), modulations, pe)

    def velocity(self, img: Tensor, txt: Tensor, modulations: Modulations, pe: Tensor) -> Tensor:
        """Return the same as `forward`, with text and modulation computed before: txt (b, l, hidden) after `txt_in`."""
        img, txt = self.first_block(self.img_in(img), txt, modulations, pe)
        return self.last_layer(self.later_blocks(img, txt, modulations, pe), modulations)

    def first_block(self, img: Tensor, txt: Tensor, modulations: Modulations, pe: Tensor) -> tuple[Tensor, Tensor]:
        """Return image and text tokens after the first block, from those after `img_in` and `txt_in`."""
        first: tuple[Tensor, Tensor] = self.double_blocks[0](img, txt, modulations.double[0], pe)
        return first

    def later_blocks(self, img: Tensor, txt: Tensor, modulations: Modulations, pe: Tensor) -> Tensor:
        """Return the image tokens after all blocks, from both kinds of tokens after the first: (b, n, hidden)."""
        for block, both in islice(zip(self.double_blocks, modulations.double, strict=True), 1, None):
            img, txt = block(img, txt, both, pe)
        x, last = torch.cat((txt, img), dim=1), len(self.single_blocks) - 1
        for index, (block, modulation) in enumerate(zip(self.single_blocks, modulations.single, strict=True)):
            x = block(x, modulation, pe, num_read=img.shape[1] if index == last else x.shape[1])
        return x[:, -img.shape[1] :]

    def last_layer(self, img: Tensor, modulations: Modulations) -> Tensor:
        """Return the velocity from the image tokens after all blocks."""
        velocity: Tensor = self.final_layer(img, modulations.last)
        return velocity

    def modulations(self, vec: Tensor) -> Modulations:
        """Return the modulation of all blocks, from `conditioning` (rows, hidden), a row for each image and step."""
        double, single = ([block.modulation(vec) for block in blocks] for blocks in self.blocks)
        return Modulations(double, single, self.final_layer.modulation(vec))

    @property
    def blocks(self) -> tuple[list[Any], list[Any]]:
        """The double and the single blocks."""
        return list(self.double_blocks), list(self.single_blocks)

    def conditioning(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """Return the conditioning vector: (b, hidden), summed in the order of BFL and diffusers."""
        vec = self.time_in(timestep_embedding(timesteps))
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this model embeds guidance: pass a value for each image")
            vec = vec + self.guidance_in(timestep_embedding(guidance))
        return vec + self.vector_in(y)

    def position_table(self, ids: Tensor) -> Tensor:
        """Return the rotary table `pe`, the same at every step: ids (l + n, 3) -> (l + n, head_dim / 2, 2)."""
        return rotary_table(ids, self.params.axes_dim, self.params.theta)
