"""Deterministic weights and inputs without a random generator, and tiny models for the golden numbers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from flux_batch.model import params
from flux_batch.model.params import DEV

FLUX = replace(
    DEV,
    vec_in_dim=32,
    context_in_dim=24,
    hidden_size=64,
    mlp_hidden_dim=256,
    num_heads=4,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 6, 6),
)
AUTOENCODER = replace(params.AUTOENCODER, channels=(32, 64, 128, 128))


def u(name: str, shape: Sequence[int]) -> np.ndarray:
    """Return numbers in [-1, 1) that depend only on the name and the position: fp64."""
    z = np.arange(math.prod(shape), dtype=np.uint32) * np.uint32(0x9E3779B9) + np.uint32(zlib.crc32(name.encode()))
    z ^= z >> np.uint32(16)
    z *= np.uint32(0x85EBCA6B)
    z ^= z >> np.uint32(13)
    z *= np.uint32(0xC2B2AE35)
    z ^= z >> np.uint32(16)
    return (z.astype(np.float64) / 2**32 * 2 - 1).reshape(shape)


def tensor(name: str, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    return torch.from_numpy(scale * u(name, shape)).float()


def weight(name: str, shape: Sequence[int]) -> Tensor:
    if len(shape) == 1 and name.endswith(("weight", "norm.scale")):
        return torch.from_numpy(1 + 0.1 * u(name, shape)).float()
    return tensor(name, shape, 0.1 if len(shape) == 1 else math.sqrt(3 / math.prod(shape[1:])))


def filled(model: nn.Module, prefix: str = "") -> nn.Module:
    """Fill each parameter of a model with values that depend on its name."""
    state = {name: weight(prefix + name, value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def check(
    value: Tensor, total: float, abs_total: float, first: Sequence[float] = (), last: Sequence[float] = ()
) -> None:
    """Compare with a golden line: sum, sum of magnitudes, first and last values in row-major order."""
    flat = value.double().flatten()
    expected = torch.tensor([*first, *last], dtype=torch.float64)
    actual = torch.cat((flat[: len(first)], flat[len(flat) - len(last) :]))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    # The tolerance of a sum grows with the number of its terms.
    atol = 1e-5 + 5e-6 * flat.numel()
    torch.testing.assert_close(flat.sum().item(), total, atol=atol, rtol=1e-6)
    torch.testing.assert_close(flat.abs().sum().item(), abs_total, atol=atol, rtol=1e-6)
