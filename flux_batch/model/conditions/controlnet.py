"""ControlNets: side networks whose residuals are added to the image tokens after the blocks of FLUX.

There are two kinds: InstantX's (union, Pro-2.0, Upscaler, alimama's inpainting) reads the latents of a control image,
XLabs' reads its pixels. Sources: diffusers 0.42.1, models/controlnets/controlnet_flux.py and
models/transformers/transformer_flux.py; XLabs-AI/x-flux 4749542, src/flux/controlnet.py.
Letters: b batch, n image tokens, l text tokens, h and w of the packed latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flux_batch.model.params import Config, FluxParams, Shapes, counts_at, flux_params, shape_of, used_residuals
from flux_batch.model.sampling import pack
from flux_batch.model.transformer import Denoiser, Flux, Modulations, PromptEmbeds, Residuals

_HINT_CHANNELS = 16
# A mask in the size of the latents, 2 x 2 values in each token.
_MASK_CHANNELS = 4
_HINT_STRIDES = (1, 1, 2, 1, 2, 1, 2, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlNetParams:
    """A ControlNet: `flux` describes its own blocks and embedders; it has no last layer.

    condition_channels: the channels of a packed token of the control image. num_modes: the modes of a union net, 0 for
    other nets. reads_pixels: True for XLabs' kind.
    """

    flux: FluxParams
    condition_channels: int
    num_modes: int = 0
    reads_pixels: bool = False

    def __post_init__(self) -> None:
        extra = self.condition_channels - self.flux.in_channels
        if extra not in ((0,) if self.reads_pixels else (0, _MASK_CHANNELS)):
            raise ValueError(
                f"its control image has {self.condition_channels} channels: {self.flux.in_channels} are known, and "
                f"{_MASK_CHANNELS} more for a mask"
            )

    @property
    def reads_mask(self) -> bool:
        """True for alimama's kind, which repaints the area of a mask."""
        return self.condition_channels > self.flux.in_channels


def controlnet_params(shapes: Shapes, config: Config) -> ControlNetParams:
    """Read a ControlNet's parameters from shapes by original key.

    `config`: its config.json of diffusers, or empty; read only for the rotary axes. Raises: ValueError if a key is
    missing, or the axes are not known.
    """
    rows, columns = shape_of(shapes, "img_in.weight")
    reads_pixels = "pos_embed_input.weight" in shapes
    condition = shape_of(shapes, "pos_embed_input.weight" if reads_pixels else "controlnet_x_embedder.weight")
    modes = "controlnet_mode_embedder.weight"
    return ControlNetParams(
        # A ControlNet has no last layer, but `flux_params` reads the output channels from its shape.
        flux=flux_params({**shapes, "final_layer.linear.weight": (columns, rows)}, config),
        condition_channels=condition[1],
        num_modes=shape_of(shapes, modes)[0] if modes in shapes else 0,
        reads_pixels=reads_pixels,
    )


def check_controlnet_fits(net: FluxParams, base: FluxParams) -> None:
    """Raise ValueError unless a net fits the tokens, texts and positions of its base model."""
    for title, name, wanted in (
        ("numbers in a token", "hidden_size", base.hidden_size),
        ("channels of a latent patch", "in_channels", base.out_channels),
        ("width of the T5 text encoder", "context_in_dim", base.context_in_dim),
        ("width of the CLIP text encoder", "vec_in_dim", base.vec_in_dim),
        ("rotary axes", "axes_dim", base.axes_dim),
    ):
        if (found := getattr(net, name)) != wanted:
            raise ValueError(f"it is of another model: {title} is {found}, and {wanted} in the transformer")


class ControlNet(Flux):
    """The side network: blocks of FLUX, each followed by a projection of its image tokens."""

    def __init__(self, params: ControlNetParams) -> None:
        super().__init__(params.flux)
        del self.final_layer
        p, self.controlnet_params = params.flux, params
        h = p.hidden_size
        self.controlnet_blocks = nn.ModuleList(nn.Linear(h, h) for _ in range(p.depth))
        self.controlnet_single_blocks = nn.ModuleList(nn.Linear(h, h) for _ in range(p.depth_single_blocks))
        if params.reads_pixels:
            self.pos_embed_input = nn.Linear(params.condition_channels, h)
            self.input_hint_block = _hint_block()
        else:
            self.controlnet_x_embedder = nn.Linear(params.condition_channels, h)
        self.controlnet_mode_embedder = nn.Embedding(params.num_modes, h) if params.num_modes else None

    def modulations(self, vec: Tensor) -> Modulations:
        """Return the modulation of all blocks; there is no last layer."""
        double, single = ([block.modulation(vec) for block in blocks] for blocks in self.blocks)
        return Modulations(double, single, vec[:, None, :0])

    def embed_condition(self, condition: Tensor) -> Tensor:
        """Return the embedding of a control image, added to the image tokens at every step: (b, n, hidden).

        condition: packed latents (b, n, c); for XLabs' kind pixels in [-1, 1], (b, 3, 16h, 16w).
        """
        if not self.controlnet_params.reads_pixels:
            embedded: Tensor = self.controlnet_x_embedder(condition)
            return embedded
        embedded = self.pos_embed_input(pack(self.input_hint_block(condition)))
        return embedded

    def residuals(
        self, img: Tensor, txt: Tensor, modulations: Modulations, pe: Tensor, condition: Tensor, num_double: int
    ) -> Residuals:
        """Return the projection after each block of the net, for at most `num_double` double blocks.

        img: (b, n, in_channels), the base's input without its conditions; condition: from `embed_condition`.
        """
        img = self.img_in(img) + condition
        double, single = [], []
        # A last double block that feeds no block of the base is skipped, unless single blocks follow it.
        count = len(self.double_blocks) if len(self.single_blocks) else num_double
        for index, (block, project) in enumerate(zip(self.double_blocks, self.controlnet_blocks, strict=True)):
            if index < count:
                img, txt = block(img, txt, modulations.double[index], pe)
                double.append(project(img))
        x = torch.cat((txt, img), dim=1)
        for block, project, rows in zip(
            self.single_blocks, self.controlnet_single_blocks, modulations.single, strict=True
        ):
            x = block(x, rows, pe, num_read=x.shape[1])
            single.append(project(x[:, -img.shape[1] :]))
        return Residuals(double[:num_double], single)


class ControlUse(NamedTuple):
    """A net with its control images, strength, and the steps at which it is active.

    condition: from `ControlNet.embed_condition`, (b, n, hidden). mode: the mode of a union net, else None. weights:
    (b, 1, 1), a factor of the scale for each image; None is 1 for all. start, end: shares of the steps, 0..1.
    """

    net: ControlNet
    condition: Tensor
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: int | None = None
    weights: Tensor | None = None

    @property
    def strength(self) -> Tensor | float:
        """The factor of the residuals: (b, 1, 1), or a number for all images."""
        return self.scale if self.weights is None else self.scale * self.weights

    def is_active(self, step: int, num_steps: int) -> bool:
        """Return whether the net is active at a step, as in diffusers."""
        return counts_at(step, num_steps, self.start, self.end)


class Controls:
    """The sum of the residuals of several nets for one denoising loop: call it with each step in turn.

    A second call for the same step (the pass with negative prompts) returns the residuals of the first, as in
    diffusers. pe: a function from the number of text tokens to `position_table`; a union net has one more text token.
    base: the model to whose blocks the residuals are added.
    """

    def __init__(
        self,
        uses: Sequence[ControlUse],
        base: Flux,
        text: PromptEmbeds,
        pe: Callable[[int], Tensor],
        timesteps: Tensor,
        guidance: Tensor,
    ) -> None:
        self._base = base
        self._num_steps = len(timesteps)
        self._nets = []
        for use in uses:
            num_texts = text.prompt_embeds.shape[1] + (use.mode is not None)
            denoiser = Denoiser(use.net, text, pe(num_texts), timesteps, guidance)
            if use.mode is not None and use.net.controlnet_mode_embedder is not None:
                row = use.net.controlnet_mode_embedder.weight[use.mode]
                denoiser.txt = torch.cat((row.expand(len(denoiser.txt), 1, -1), denoiser.txt), dim=1)
            self._nets.append((use, denoiser))
        self._last: tuple[int, Residuals | None] = (-1, None)

    def __call__(self, step: int, img: Tensor) -> Residuals | None:
        """Return the residuals for each block of the base; None if no net is active at the step."""
        if self._last[0] != step:
            parts = [self._residuals(use, each, step, img) for use, each in self._nets if self._counts(use, step)]
            self._last = step, _sum(parts) if parts else None
        return self._last[1]

    def changes(self, step: int) -> bool:
        """Return whether the set of active nets differs from that of the step before."""
        return any(self._counts(use, step) != self._counts(use, step - 1) for use, _ in self._nets)

    def _counts(self, use: ControlUse, step: int) -> bool:
        return bool(use.scale) and use.is_active(step, self._num_steps)

    def _residuals(self, use: ControlUse, denoiser: Denoiser, step: int, img: Tensor) -> Residuals:
        p, net, repeats = self._base.params, use.net, use.net.controlnet_params.reads_pixels
        noisy = img[..., : net.params.in_channels]
        total = len(net.double_blocks)
        num_double = used_residuals(total, p.depth, repeats)
        found = net.residuals(noisy, denoiser.txt, denoiser.modulations(step), denoiser.pe, use.condition, num_double)
        strength = use.strength
        return Residuals(
            spread([strength * each for each in found.double], p.depth, total, repeats),
            spread([strength * each for each in found.single], p.depth_single_blocks, len(found.single)),
        )


def spread(residuals: Sequence[Tensor], num_blocks: int, count: int, repeats: bool = False) -> list[Tensor]:
    """Return the residual for each block of the base.

    Each residual feeds several consecutive blocks; with `repeats` the blocks take the residuals in turn.
    count: the number of residuals of the net, unused ones included.
    """
    if not residuals:
        return []
    interval = ceil(num_blocks / count)
    return [residuals[block % count if repeats else block // interval] for block in range(num_blocks)]


def _sum(parts: Sequence[Residuals]) -> Residuals:
    """Return the sum of residuals that `spread` has already mapped to the base's blocks."""
    return Residuals(*(_sum_lists([getattr(part, kind) for part in parts]) for kind in ("double", "single")))


def _sum_lists(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the sums of tensors at the same index; equal sums share one tensor."""
    sums: dict[tuple[int, ...], Tensor] = {}
    places = list(zip(*(each for each in lists if each), strict=True))
    for place in places:
        if (key := tuple(map(id, place))) not in sums:
            sums[key] = reduce(torch.add, place)
    return [sums[tuple(map(id, place))] for place in places]


def _hint_block() -> nn.Sequential:
    """Return XLabs' eight convolutions, from pixels to features in the size of the latents."""
    layers: list[nn.Module] = []
    for index, stride in enumerate(_HINT_STRIDES):
        layers += [nn.Conv2d(_HINT_CHANNELS if index else 3, _HINT_CHANNELS, 3, stride, padding=1), nn.SiLU()]
    return nn.Sequential(*layers[:-1])
