"""Rotary position embedding over several axes.

Source of the formulas: black-forest-labs/flux 802fb47, src/flux/math.py. Deliberate difference: angles are float64, as
in diffusers and in BFL before 4343061 (2025-01-31). With bfloat16 angles, positions become inexact and images break.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def rotary_table(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> Tensor:
    """Return cos and sin of every angle: ids (l, axes) -> (l, d/2, 2) fp32, axes one after the other along d."""
    angles = [_axis_angles(ids[:, axis], dim, theta) for axis, dim in enumerate(axes_dim)]
    angle = torch.cat(angles, dim=-1)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def _axis_angles(positions: Tensor, dim: int, theta: int) -> Tensor:
    """Return position * theta^(-2k/dim): (l,) -> (l, dim/2) float64."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    return torch.outer(positions.double(), theta**-exponents)


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate each pair of neighbours (2k, 2k+1) of a head vector in fp32: x (b, l, h, d), pe (l, d/2, 2)."""
    pairs = rearrange(x.float(), "b l h (d pair) -> b l h d pair", pair=2)
    rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(pe[:, None]))
    return rearrange(rotated, "b l h d pair -> b l h (d pair)").to(x.dtype)


def rotate_in_parts(x: Tensor, pe: Tensor) -> Tensor:
    """Return the same as `rotate`, without complex numbers. The compiler fuses it with the norm before it.

    Every number is x cos + neighbour (+-sin) in one expression; concatenating two results would need a kernel of its
    own. Signs come from `arange`, not from memory: together with the norm there are 8 reads, and beyond 8 inductor
    writes an fp32 result to memory before it rounds (realize_acc_reads_threshold).
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = pe[:, None, :, :, None].unbind(-2)
    signs = torch.arange(-1, 2, 2, device=x.device)
    rotated = pairs * cos + pairs.flip(-1) * (sin * signs)
    return rotated.flatten(-2).to(x.dtype)
