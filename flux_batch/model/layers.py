"""The layers of a FLUX transformer; attribute names are the keys of the original checkpoints.

The attributes `matmul`, `project` and `rotate` hold functions of this file and of rope.py; model/optimize/ replaces
them for some devices and for the compiler.
Letters: B batch, L tokens, H heads, D head size.
Source of the formulas: black-forest-labs/flux 802fb47, src/flux/modules/layers.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux_batch.model.rope import rotate

SINUSOID_WIDTH = 256
_FP16_MAX = 65504.0

# Apply a linear layer: x (..., i), weight (o, i), bias (o,) or None -> (..., o).
Matmul: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# See `project` and `rotate`.
_Project: TypeAlias = Callable[[nn.Module, Tensor, Sequence[int], Sequence[int]], Sequence[Tensor]]
_Rotate: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def timestep_embedding(t: Tensor) -> Tensor:
    """Return the embedding of 1000 t: t (B,) -> (B, 256), cosines first, in the dtype of t.

    The product with 1000 is rounded to that dtype, as in BFL and diffusers: guidance 3.5 becomes 3504 in bfloat16.
    """
    half = SINUSOID_WIDTH // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = (1000.0 * t)[:, None].float() * frequencies
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(t.dtype)


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """Norm by the root mean square, rounded once, after the scale, as in diffusers.

    BFL and DiffSynth also round before the scale, which changes results in 16-bit dtypes only.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, eps=1e-6)


class _QKNorm(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class _Modulation(nn.Module):
    """The map from the conditioning vector to each branch's shift, scale and gate.

    (B, hidden) -> (B, 1, 3 num_branches hidden).
    """

    def __init__(self, dim: int, num_branches: int) -> None:
        super().__init__()
        self.lin = nn.Linear(dim, 3 * num_branches * dim)

    def forward(self, vec: Tensor) -> Tensor:
        return self.lin(F.silu(vec))[:, None, :]


class _Branch(NamedTuple):
    """The modulation of one branch of a block: each (B, 1, hidden)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def modulate(self, x: Tensor) -> Tensor:
        return _modulate(x, self.shift, self.scale)


def _branches(modulation: Tensor, count: int) -> list[_Branch]:
    """Split the result of a `_Modulation`: (B, 1, 3 count hidden)."""
    rows = modulation.chunk(3 * count, dim=-1)
    return [_Branch(*rows[3 * branch : 3 * branch + 3]) for branch in range(count)]


class SelfAttention(nn.Module):
    """The projections of one stream, before and after the joint attention."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = BlockLinear(dim, 3 * dim, bias=qkv_bias)
        self.norm = _QKNorm(dim // num_heads)
        self.proj = BlockLinear(dim, dim)
        self.project: _Project = project

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, length, dim = x.shape
        q, k, v = (_heads(part, self.num_heads) for part in self.project(self.qkv, x, 3 * (dim,), 3 * (length,)))
        q, k = self.norm(q, k)
        return q, k, v


class DoubleStreamBlock(nn.Module):
    """A block in which image and text have their own weights, and meet in attention."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, qkv_bias: bool) -> None:
        super().__init__()
        self.img_mod = _Modulation(dim, num_branches=2)
        self.img_attn = SelfAttention(dim, num_heads, qkv_bias)
        self.img_mlp = _mlp(dim, mlp_dim)
        self.txt_mod = _Modulation(dim, num_branches=2)
        self.txt_attn = SelfAttention(dim, num_heads, qkv_bias)
        self.txt_mlp = _mlp(dim, mlp_dim)
        self.attention = JointAttention()

    def modulation(self, vec: Tensor) -> tuple[Tensor, Tensor]:
        """Return the modulation of the image and of the text: each (B, 1, 6 hidden)."""
        return self.img_mod(vec), self.txt_mod(vec)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        modulation: tuple[Tensor, Tensor],
        pe: Tensor,
        image_prompt: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return both streams after the block.

        image_prompt: keys and values (B, M, H, D) of each IP-Adapter. The queries of the image attend to them without
        positions.
        """
        (img_1, img_2), (txt_1, txt_2) = (_branches(part, 2) for part in modulation)

        img_qkv = self.img_attn(img_1.modulate(img))
        txt_qkv = self.txt_attn(txt_1.modulate(txt))
        attn = self.attention((txt_qkv, img_qkv), pe)
        txt_attn, img_attn = attn.split((txt.shape[1], img.shape[1]), dim=1)

        img = img + img_1.gate * self.img_attn.proj(img_attn)
        img = img + img_2.gate * self.img_mlp(img_2.modulate(img))
        for key, value in image_prompt:
            img = img + _attend(img_qkv[0], key, value)
        txt = txt + txt_1.gate * self.txt_attn.proj(txt_attn)
        txt = txt + txt_2.gate * self.txt_mlp(txt_2.modulate(txt))
        return finite(img), finite(txt)


class SingleStreamBlock(nn.Module):
    """A block with text and image as one sequence. Attention and MLP share fused projections."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.widths = (dim, dim, dim, mlp_dim)
        self.linear1 = BlockLinear(dim, 3 * dim + mlp_dim)
        self.linear2 = BlockLinear(dim + mlp_dim, dim)
        self.norm = _QKNorm(dim // num_heads)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = _Modulation(dim, num_branches=1)
        self.attention = JointAttention()
        self.project: _Project = project

    def forward(self, x: Tensor, modulation: Tensor, pe: Tensor, num_read: int) -> Tensor:
        """Return the last `num_read` tokens: (B, num_read, hidden). Earlier tokens serve as keys and values only."""
        (branch,) = _branches(modulation, 1)
        lengths = (num_read, x.shape[1], x.shape[1], num_read)
        *qkv, hidden = self.project(self.linear1, branch.modulate(x), self.widths, lengths)
        q, k, v = (_heads(part, self.num_heads) for part in qkv)
        q, k = self.norm(q, k)
        attn = self.attention([(q, k, v)], pe)
        change = self.linear2(torch.cat((attn, self.mlp_act(hidden)), dim=-1))
        return finite(x[:, -num_read:] + branch.gate * change)


class LastLayer(nn.Module):
    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def modulation(self, vec: Tensor) -> Tensor:
        """Return shift and scale side by side: (B, 1, 2 hidden)."""
        rows: Tensor = self.adaLN_modulation(vec)[:, None, :]
        return rows

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(_modulate(x, shift, scale))


class BlockLinear(nn.Linear):
    """A linear layer of a block, whose `matmul` can be replaced."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.matmul: Matmul = F.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.weight, self.bias)


class JointAttention(nn.Module):
    """Attention of all tokens to all, with rotary positions. No mask hides the padding, as in BFL and diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.rotate: _Rotate = rotate

    def forward(self, streams: Sequence[tuple[Tensor, Tensor, Tensor]], pe: Tensor) -> Tensor:
        """Return the result of attention for the queries of all streams, stream after stream: (B, M, H D).

        streams: the queries (B, <= L, H, D) of each stream's last tokens, and the keys and values (B, L, H, D) of all
        its tokens; pe: of all tokens. Streams are concatenated after norm and rotation, so that a compiler can fuse
        those two into one kernel.
        """
        tables = pe.split([k.shape[1] for _, k, _ in streams])
        rotated = [self._rotated(*stream, table) for stream, table in zip(streams, tables, strict=True)]
        parts = rotated[0] if len(rotated) == 1 else [torch.cat(part, dim=1) for part in zip(*rotated, strict=True)]
        q, k, v = (rearrange(part, "B L H D -> B H L D") for part in parts)
        x = F.scaled_dot_product_attention(q, k, v)
        return rearrange(x, "B H L D -> B L (H D)")

    def _rotated(self, q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.rotate(q, pe[-q.shape[1] :]), self.rotate(k, pe), v


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention without positions: q (B, L, H, D); k, v (B, M, H, D) -> (B, L, H D)."""
    q, k, v = (rearrange(part, "B L H D -> B H L D") for part in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "B H L D -> B L (H D)")


def _mlp(dim: int, hidden_dim: int) -> nn.Sequential:
    return nn.Sequential(BlockLinear(dim, hidden_dim), nn.GELU(approximate="tanh"), BlockLinear(hidden_dim, dim))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def project(linear: nn.Module, x: Tensor, widths: Sequence[int], lengths: Sequence[int]) -> Sequence[Tensor]:
    """Apply projections that share one matrix, each for its last tokens: (B, L, dim) -> (B, length, width) each."""
    parts: Sequence[Tensor] = linear(x).split(widths, dim=-1)
    return [part[:, -length:] for part, length in zip(parts, lengths, strict=True)]


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return rearrange(x, "B L (H D) -> B L H D", H=num_heads)


def finite(x: Tensor) -> Tensor:
    """Clip a float16 stream to its range; an overflow gives black images (diffusers #9096, #9097).

    diffusers does not clip the image tokens of double blocks; this differs only for images that would be black there.
    """
    return x.clamp(-_FP16_MAX, _FP16_MAX) if x.dtype == torch.float16 else x
