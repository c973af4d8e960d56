"""The FLUX transformer: packed image tokens and a text in, the velocity of each token out; knows no schedule.

Attribute names are the keys of the original checkpoints. Source of the layout: black-forest-labs/flux 802fb47,
src/flux/model.py. Letters: b batch, l text tokens, n image tokens.
"""

from __future__ import annotations

from itertools import islice

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
from flux_batch.model.params import FluxParams
from flux_batch.model.rope import rotary_table


class Flux(nn.Module):
    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        p = self.params = params
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

        img: (b, n, in_channels); txt: (b, l, context_in_dim) T5 states; pe: `position_table` of text then image;
        timesteps: (b,) in [0, 1], 1 is pure noise; y: (b, vec_in_dim) CLIP pooled; guidance: (b,), unused by a
        model without its embedder. All in the dtype of the weights.
        """
        vec = self.conditioning(timesteps, y, guidance)
        img, txt = self.double_blocks[0](self.img_in(img), self.txt_in(txt), vec, pe)
        return self.final_layer(self.later_blocks(img, txt, vec, pe), vec)

    def later_blocks(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        """Return the image tokens after all blocks, from what the first one makes of both: (b, n, hidden)."""
        for block in islice(self.double_blocks, 1, None):
            img, txt = block(img, txt, vec, pe)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, vec, pe)
        return x[:, txt.shape[1] :]

    def conditioning(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """Return the vector that modulates every block: (b, hidden). Summed in the order of BFL and diffusers."""
        vec = self.time_in(timestep_embedding(timesteps))
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this model embeds guidance: pass a value for each image")
            vec = vec + self.guidance_in(timestep_embedding(guidance))
        return vec + self.vector_in(y)

    def position_table(self, ids: Tensor) -> Tensor:
        """Return what `forward` takes as `pe`, the same at every step: ids (l + n, 3) -> (2, l + n, head_dim / 2)."""
        return rotary_table(ids, self.params.axes_dim, self.params.theta)
