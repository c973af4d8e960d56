"""The parts a FLUX transformer is made of; attribute names are the keys of the original checkpoints.

Letters: B batch, L tokens, H heads, D head size, K the three of query, key and value.
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
FP16_MAX = 65504.0

# Applies a linear layer: x (..., i), weight (o, i), bias (o,) or None -> (..., o).
Product: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def timestep_embedding(t: Tensor) -> Tensor:
    """Embed a scalar of each image, times 1000: t (B,) -> (B, 256), cosines first, in the dtype of t.

    The product with 1000 is rounded to that dtype, as in every reference: guidance 3.5 becomes 3504 in bfloat16.
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
    """Rounds once, after the scale, as diffusers; BFL and DiffSynth round before it too (bfloat16 only)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, eps=1e-6)


class QKNorm(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class Modulation(nn.Module):
    """Makes of the conditioning vector what modulates a block, shift, scale and gate of each branch."""

    def __init__(self, dim: int, num_branches: int) -> None:
        super().__init__()
        self.lin = nn.Linear(dim, 3 * num_branches * dim)

    def forward(self, vec: Tensor) -> Tensor:
        return self.lin(F.silu(vec))[:, None, :]


class Branch(NamedTuple):
    """What modulates one branch of a block: each (B, 1, hidden)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def normed(self, x: Tensor) -> Tensor:
        return modulated(x, self.shift, self.scale)

    def added(self, x: Tensor, change: Tensor) -> Tensor:
        return x + self.gate * change


def branches(modulation: Tensor, count: int) -> list[Branch]:
    """Take a `Modulation`'s result (B, 1, 3 count hidden) apart."""
    rows = modulation.chunk(3 * count, dim=-1)
    return [Branch(*rows[3 * branch : 3 * branch + 3]) for branch in range(count)]


class SelfAttention(nn.Module):
    """The projections of one stream; attention itself is joint, see `attention`."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, length, dim = x.shape
        q, k, v = (heads(part, self.num_heads) for part in project(self.qkv, x, 3 * (dim,), 3 * (length,)))
        q, k = self.norm(q, k)
        return q, k, v


class DoubleStreamBlock(nn.Module):
    """Image and text each with their own weights, meeting in attention."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, qkv_bias: bool) -> None:
        super().__init__()
        self.img_mod = Modulation(dim, num_branches=2)
        self.img_attn = SelfAttention(dim, num_heads, qkv_bias)
        self.img_mlp = mlp(dim, mlp_dim)
        self.txt_mod = Modulation(dim, num_branches=2)
        self.txt_attn = SelfAttention(dim, num_heads, qkv_bias)
        self.txt_mlp = mlp(dim, mlp_dim)

    def modulation(self, vec: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `forward` takes as `modulation`, of the image and of the text."""
        return self.img_mod(vec), self.txt_mod(vec)

    def forward(self, img: Tensor, txt: Tensor, modulation: tuple[Tensor, Tensor], pe: Tensor) -> tuple[Tensor, Tensor]:
        (img_1, img_2), (txt_1, txt_2) = (branches(part, 2) for part in modulation)

        img_q, img_k, img_v = self.img_attn(img_1.normed(img))
        txt_q, txt_k, txt_v = self.txt_attn(txt_1.normed(txt))
        q = torch.cat((txt_q, img_q), dim=1)
        k = torch.cat((txt_k, img_k), dim=1)
        v = torch.cat((txt_v, img_v), dim=1)
        txt_attn, img_attn = attention(q, k, v, pe).split((txt.shape[1], img.shape[1]), dim=1)

        img = img_1.added(img, self.img_attn.proj(img_attn))
        img = img_2.added(img, self.img_mlp(img_2.normed(img)))
        txt = txt_1.added(txt, self.txt_attn.proj(txt_attn))
        txt = txt_2.added(txt, self.txt_mlp(txt_2.normed(txt)))
        return finite(img), finite(txt)


class SingleStreamBlock(nn.Module):
    """Text and image as one sequence; attention and MLP side by side in fused projections."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.widths = (dim, dim, dim, mlp_dim)
        self.linear1 = Linear(dim, 3 * dim + mlp_dim)
        self.linear2 = Linear(dim + mlp_dim, dim)
        self.norm = QKNorm(dim // num_heads)
        self.modulation = Modulation(dim, num_branches=1)

    def forward(self, x: Tensor, modulation: Tensor, pe: Tensor, read: int) -> Tensor:
        """Return the last `read` tokens; those before them are attended to and else left out."""
        (branch,) = branches(modulation, 1)
        length = x.shape[1]
        *qkv, hidden = project(self.linear1, branch.normed(x), self.widths, (read, length, length, read))
        q, k, v = (heads(part, self.num_heads) for part in qkv)
        q, k = self.norm(q, k)
        attn = attention(q, k, v, pe)
        change = self.linear2(torch.cat((attn, gelu(hidden)), dim=-1))
        return finite(branch.added(x[:, -read:], change))


class LastLayer(nn.Module):
    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def modulation(self, vec: Tensor) -> Tensor:
        """Return what `forward` takes as `modulation`: (B, 1, 2 hidden)."""
        rows: Tensor = self.adaLN_modulation(vec)[:, None, :]
        return rows

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(modulated(x, shift, scale))


def mlp(dim: int, hidden_dim: int) -> nn.Sequential:
    return nn.Sequential(Linear(dim, hidden_dim), GELU(), Linear(hidden_dim, dim))


class Linear(nn.Linear):
    """A matrix of a block; what multiplies with it may be changed from outside, see model/optimize/cpu_products.py."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.product: Product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


class GELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


def gelu(x: Tensor) -> Tensor:
    """Apply GELU in its approximation with tanh: (1 + tanh(u / 2)) / 2 is the sigmoid of u."""
    if torch.compiler.is_compiling():  # which makes a sigmoid in less than half the time of a tanh
        wide = x.float()
        return (wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def project(linear: nn.Module, x: Tensor, widths: Sequence[int], lengths: Sequence[int]) -> Sequence[Tensor]:
    """Apply projections that lie in one matrix, each to the last tokens: (B, L, dim) -> (B, length, width) each.

    In one product, but for a CPU: there that saves nothing, some kernels (bfloat16 with AMX) round a wide product
    otherwise than the narrow ones of diffusers, and one of more than 32 MB is new memory from the system every time.
    """
    if not isinstance(linear, Linear) or x.device.type != "cpu":
        parts: Sequence[Tensor] = linear(x).split(widths, dim=-1)
        return [part[:, -length:] for part, length in zip(parts, lengths, strict=True)]
    biases = [None] * len(widths) if linear.bias is None else linear.bias.split(widths)
    of_parts = zip(linear.weight.split(widths), biases, lengths, strict=True)
    if x.dtype == torch.float32:
        return [linear.product(x[:, -length:], weight, bias) for weight, bias, length in of_parts]
    # The same kernels round a product of fewer rows otherwise, too.
    return [linear.product(x, weight, bias)[:, -length:] for weight, bias, length in of_parts]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer; compiled for a CPU, the bias is left to the kernel that reads the product.

    With a bias, a CPU first writes that out in full size.
    """
    if bias is not None and x.device.type == "cpu" and torch.compiler.is_compiling():
        return F.linear(x, weight) + bias
    return F.linear(x, weight, bias)


def heads(x: Tensor, num_heads: int) -> Tensor:
    return rearrange(x, "B L (H D) -> B L H D", H=num_heads)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """Attend to all tokens, padding included (no mask, as every reference), from the last ones, as many as q has.

    q: (B, M, H, D); k, v: (B, L, H, D); pe: of all L. Returns: (B, M, H D).
    """
    parts = rotate(q, pe[-q.shape[1] :]), rotate(k, pe), v
    q, k, v = (rearrange(part, "B L H D -> B H L D") for part in parts)
    x = F.scaled_dot_product_attention(q, k, v)
    return rearrange(x, "B H L D -> B L (H D)")


def finite(x: Tensor) -> Tensor:
    """Keep a float16 stream in range: without this it overflows to black images (diffusers #9096, #9097).

    diffusers leaves out the images of the double blocks, which changes nothing but images that would be lost.
    """
    return x.clamp(-FP16_MAX, FP16_MAX) if x.dtype == torch.float16 else x
