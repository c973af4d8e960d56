"""The FLUX transformer: packed image tokens and a text in, the velocity of each token out.

Attribute names are the keys of the original checkpoints. Source of the layout: black-forest-labs/flux 802fb47,
src/flux/model.py. Letters: b batch, l text tokens, n image tokens, s steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from flux_batch.model.layers import (
    SINUSOID_WIDTH,
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    SingleStreamBlock,
    finite,
    timestep_embedding,
)
from flux_batch.model.params import MODULATION_ROWS, FluxParams
from flux_batch.model.rope import rotary_table
from flux_batch.model.sampling import on_device, position_ids

# A FLUX.1 table takes 2.4 MB at 1024 x 1024 with 512 text tokens, 8.7 MB at 2048 x 2048.
_MAX_POSITION_TABLES = 8


class PromptEmbeds(NamedTuple):
    """The embeddings of some prompts, with the names of diffusers.

    prompt_embeds: (b, l, context), T5's states; pooled_prompt_embeds: (b, vec), CLIP's pooled embedding.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> PromptEmbeds:
        """Return the embeddings on a device, in a dtype."""
        return PromptEmbeds(*(part.to(device, dtype) for part in self))


class Residuals(NamedTuple):
    """The residuals that side networks add to the image tokens after each block.

    (b, n, hidden) for each block of a kind, or an empty sequence for none.
    """

    double: Sequence[Tensor]
    single: Sequence[Tensor]

    def select(self, images: Tensor) -> Residuals:
        """Return the residuals of some images of the batch. images: indices on the device."""
        chosen: dict[int, Tensor] = {}  # blocks may share a residual: select each tensor once
        for each in (*self.double, *self.single):
            if id(each) not in chosen:
                chosen[id(each)] = each.index_select(0, images)
        return Residuals(*([chosen[id(each)] for each in kind] for kind in self))


class ImagePrompt(NamedTuple):
    """The keys and values of image prompts for each double block.

    Each block has one pair (b, m, heads, head_dim) for each IP-Adapter.
    """

    blocks: Sequence[Sequence[tuple[Tensor, Tensor]]]

    @classmethod
    def joined(cls, prompts: Sequence[ImagePrompt]) -> ImagePrompt:
        """Return the image prompts of several IP-Adapters as one; the results of their attentions are summed."""
        blocks = zip(*(prompt.blocks for prompt in prompts), strict=True)
        return cls([[pair for of_one in of_block for pair in of_one] for of_block in blocks])

    def select(self, images: Tensor) -> ImagePrompt:
        """Return the keys and values of some images of the batch. images: indices on the device."""
        return ImagePrompt(
            [[(k.index_select(0, images), v.index_select(0, images)) for k, v in block] for block in self.blocks]
        )


class _SideNetworks(Protocol):
    """The networks that add residuals to a transformer's image tokens in one denoising loop."""

    def __call__(self, step: int, img: Tensor) -> Residuals | None:
        """Return the residuals at a step for its image tokens (b, n, in_channels), or None."""
        ...

    def changes(self, step: int) -> bool:
        """Return whether the set of active networks differs from that of the step before."""
        ...


class Modulations(NamedTuple):
    """The modulation of all blocks, for some rows: each (rows, 1, a multiple of hidden)."""

    double: list[tuple[Tensor, Tensor]]
    single: list[Tensor]
    last: Tensor

    def select(self, rows: slice | Tensor) -> Modulations:
        """Return the modulation of some rows. rows: a slice, or indices on the device."""
        return self.map(lambda modulation: modulation[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> Modulations:
        """Return the results of `change` on each tensor."""
        double = [(change(img), change(txt)) for img, txt in self.double]
        return Modulations(double, [change(modulation) for modulation in self.single], change(self.last))

    def tensors(self) -> list[Tensor]:
        """Return all tensors, always in the same order."""
        return [*chain.from_iterable(self.double), *self.single, self.last]


class Flux(nn.Module):
    """The transformer. `modulation_rows`: the rows of modulation that a `Denoiser` computes together."""

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

        The pipeline computes the same with `Denoiser` and `velocity`, which compute the parts that do not depend on the
        image only once.
        img: (b, n, in_channels); txt: (b, l, context_in_dim) T5 states; pe: `position_table` of text then image;
        timesteps: (b,) in [0, 1], 1 is pure noise; y: (b, vec_in_dim) CLIP pooled; guidance: (b,), unused by a
        model without guidance embedder. All in the dtype of the weights. Raises: ValueError if a model that needs
        guidance gets none.
        """
        modulations = self.modulations(self.conditioning(timesteps, y, guidance))
        return self.velocity(img, self.txt_in(txt), modulations, pe)

    def velocity(
        self,
        img: Tensor,
        txt: Tensor,
        modulations: Modulations,
        pe: Tensor,
        residuals: Residuals | None = None,
        prompt: ImagePrompt | None = None,
    ) -> Tensor:
        """Return the same as `forward` from precomputed modulations and txt (b, l, hidden) after `txt_in`."""
        img, txt = self.first_block(self.img_in(img), txt, modulations, pe, prompt)
        return self.last_layer(self.later_blocks(img, txt, modulations, pe, residuals, prompt), modulations)

    def first_block(
        self, img: Tensor, txt: Tensor, modulations: Modulations, pe: Tensor, prompt: ImagePrompt | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return image and text tokens after the first block, from those after `img_in` and `txt_in`."""
        prompted = {"image_prompt": prompt.blocks[0]} if prompt else {}
        first: tuple[Tensor, Tensor] = self.double_blocks[0](img, txt, modulations.double[0], pe, **prompted)
        return first

    def later_blocks(
        self,
        img: Tensor,
        txt: Tensor,
        modulations: Modulations,
        pe: Tensor,
        residuals: Residuals | None = None,
        prompt: ImagePrompt | None = None,
    ) -> Tensor:
        """Return the image tokens after all blocks, from image and text tokens after the first: (b, n, hidden).

        residuals: added to the image tokens after each block, also after the first one.
        """
        double, single = residuals or ((), ())
        img = finite(img + double[0]) if double else img
        for index in range(1, len(self.double_blocks)):
            prompted = {"image_prompt": prompt.blocks[index]} if prompt else {}
            img, txt = self.double_blocks[index](img, txt, modulations.double[index], pe, **prompted)
            img = finite(img + double[index]) if double else img
        n, last = img.shape[1], len(self.single_blocks) - 1
        x = torch.cat((txt, img), dim=1)
        for index, (block, modulation) in enumerate(zip(self.single_blocks, modulations.single, strict=True)):
            x = block(x, modulation, pe, num_read=n if index == last else x.shape[1])
            if single:
                x = torch.cat((x[:, :-n], finite(x[:, -n:] + single[index])), dim=1)
        return x[:, -n:]

    def last_layer(self, img: Tensor, modulations: Modulations) -> Tensor:
        """Return the velocity from the image tokens after all blocks."""
        velocity: Tensor = self.final_layer(img, modulations.last)
        return velocity

    def modulations(self, vec: Tensor) -> Modulations:
        """Return the modulation of all blocks from `conditioning`: (rows, hidden), a row for each image and step."""
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


class Denoiser:
    """A Flux with the texts and steps of one denoising loop: call it with each step in turn.

    Everything that does not depend on the image is computed only once. The velocities equal those of `Flux.forward`,
    except for the order of sums in modulation.
    pe: `position_table` of text then image; timesteps: (s,) in [0, 1]; guidance: (b,), unused by a model without
    guidance embedder; side_networks: ControlNets, whose residuals are added to the image tokens; prompt: the image
    prompt of IP-Adapters.
    """

    def __init__(
        self,
        model: Flux,
        text: PromptEmbeds,
        pe: Tensor,
        timesteps: Tensor,
        guidance: Tensor | None = None,
        side_networks: _SideNetworks | None = None,
        prompt: ImagePrompt | None = None,
    ) -> None:
        self.model = model
        self.pe = pe
        self.txt = model.txt_in(text.prompt_embeds)
        self.num_steps = len(timesteps)
        self._y = text.pooled_prompt_embeds
        self._timesteps = timesteps
        self._guidance = guidance
        self.side_networks = side_networks
        self.prompt = prompt
        self._steps = range(0)
        self._modulations: Modulations | None = None

    def __call__(self, step: int, img: Tensor) -> Tensor:
        """Return the velocity (noise - data) of image tokens (b, n, in_channels): (b, n, out_channels)."""
        residuals = self.residuals(step, img)
        return self.model.velocity(img, self.txt, self.modulations(step), self.pe, residuals, self.prompt)

    def residuals(self, step: int, img: Tensor) -> Residuals | None:
        """Return the residuals of the side networks at a step, or None."""
        return None if self.side_networks is None else self.side_networks(step, img)

    def modulations(self, step: int) -> Modulations:
        """Return the modulation of all blocks at a step, b rows. Several steps are computed at once."""
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


def position_tables(model: Flux, device: torch.device, max_tables: int = _MAX_POSITION_TABLES) -> Callable[..., Tensor]:
    """Return a function that computes the rotary table of each size once.

    The most recently used tables stay on `device`. The function takes the arguments of `position_ids` and returns the
    `position_table` of text, references and latents: (l + n, head_dim / 2, 2) fp32.
    """

    @lru_cache(max_tables)
    def table(
        num_txt_tokens: int, height: int, width: int, references: tuple[tuple[int, int, int, int], ...] = ()
    ) -> Tensor:
        # Computed on the CPU in float64, which not every device has.
        return on_device(model.position_table(position_ids(num_txt_tokens, height, width, references)), device)

    return table
