"""The autoencoder: pixels to scaled latents and back.

Attribute names are the keys of the original checkpoints. Source of the layout: black-forest-labs/flux 802fb47,
src/flux/modules/autoencoder.py. Letters: b batch, c channels, h and w of the image or the latents.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux_batch.model.params import AutoencoderParams


class _ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(in_channels, num_groups)
        self.conv1 = _conv3x3(in_channels, out_channels)
        self.norm2 = _group_norm(out_channels, num_groups)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class _AttnBlock(nn.Module):
    """Attention with one head over all positions.

    Checkpoints hold its four matrices as 1 x 1 convolutions. Applied as matrices they are faster and round as diffusers
    does.
    """

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = _group_norm(channels, num_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")
        q, k, v = (_as_matrix(part, tokens) for part in (self.q, self.k, self.v))
        tokens = _as_matrix(self.proj_out, F.scaled_dot_product_attention(q, k, v))
        return x + rearrange(tokens, "b 1 (h w) c -> b c h w", h=x.shape[2])


class _Mid(nn.Module):
    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.block_1 = _ResnetBlock(channels, channels, num_groups)
        self.attn_1 = _AttnBlock(channels, num_groups)
        self.block_2 = _ResnetBlock(channels, channels, num_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """The blocks of one resolution, then the step to the next one, if any."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, num_groups: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(_ResnetBlock(before, after, num_groups) for before, after in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class _DownLevel(_Level):
    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, num_groups: int, is_last: bool) -> None:
        super().__init__(in_channels, out_channels, num_blocks, num_groups)
        self.downsample = None if is_last else _Downsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.downsample is None else self.downsample(x)


class _UpLevel(_Level):
    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, num_groups: int, is_last: bool) -> None:
        super().__init__(in_channels, out_channels, num_blocks, num_groups)
        self.upsample = None if is_last else _Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.upsample is None else self.upsample(x)


class _Encoder(nn.Module):
    def __init__(self, p: AutoencoderParams) -> None:
        super().__init__()
        widths = [p.channels[0], *p.channels]
        self.conv_in = _conv3x3(p.in_channels, widths[0])
        self.down = nn.ModuleList(
            _DownLevel(before, after, p.num_res_blocks, p.num_groups, is_last=level == len(p.channels) - 1)
            for level, (before, after) in enumerate(pairwise(widths))
        )
        self.mid = _Mid(widths[-1], p.num_groups)
        self.norm_out = _group_norm(widths[-1], p.num_groups)
        self.conv_out = _conv3x3(widths[-1], 2 * p.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class _Decoder(nn.Module):
    def __init__(self, p: AutoencoderParams) -> None:
        super().__init__()
        widths = [*p.channels, p.channels[-1]]
        self.conv_in = _conv3x3(p.z_channels, widths[-1])
        self.mid = _Mid(widths[-1], p.num_groups)
        # Levels are numbered as in the encoder, so the coarsest level, which runs first here, is the last of the list.
        self.up = nn.ModuleList(
            _UpLevel(before, after, p.num_res_blocks + 1, p.num_groups, is_last=level == 0)
            for level, (after, before) in enumerate(pairwise(widths))
        )
        self.norm_out = _group_norm(widths[0], p.num_groups)
        self.conv_out = _conv3x3(widths[0], p.out_ch)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = _Encoder(params)
        self.decoder = _Decoder(params)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return scaled latents: (b, 3, h, w) in [-1, 1] -> (b, z, h/8, w/8).

        noise: in the shape of the result, to sample the posterior as diffusers does; None takes the mean, as BFL does.
        """
        return self.sample(self.encoder(image), noise)

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return scaled latents from the encoder's means and logvars: (b, 2z, h, w) -> (b, z, h, w)."""
        mean, logvar = moments.chunk(2, dim=1)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise
        return (z - self.params.shift_factor) * self.params.scale_factor

    def decode(self, z: Tensor) -> Tensor:
        """Return pixels, about [-1, 1]: scaled latents (b, z, h, w) -> (b, 3, 8h, 8w)."""
        return self.decoder(z / self.params.scale_factor + self.params.shift_factor)


def _as_matrix(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 1 x 1 convolution to the last axis."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def _group_norm(channels: int, num_groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=1e-6)


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)
