"""GGUF blocks to numbers: bit for bit what the package `gguf` computes, for the common formats on any device.

A block holds a row's next 32 or 256 numbers as small integers q and one or two fp16 factors: d q, or d q - m. Formats
and field order: ggml-org/ggml, src/ggml-common.h; the arithmetic is in fp32, one operation after another, as there.
Letters: n blocks, y bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import gguf
import torch
from torch import Tensor

Blocks = Callable[[Tensor], Tensor]


def dequantize(rows: Tensor, dtype: str) -> Tensor:
    """Return the numbers (rows, columns) in fp32 of packed rows (rows, bytes) uint8, on their device.

    `dtype`: a GGUF type, as Q4_K. Raises: ValueError if they are not finite, which no whole file's are.
    """
    kind = gguf.GGMLQuantizationType[dtype]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    if dtype in FORMATS:
        numbers = FORMATS[dtype](rows.reshape(-1, size)).reshape(len(rows), -1)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # not finite: said below
            numbers = torch.from_numpy(gguf.dequantize(rows.cpu().numpy(), kind)).to(rows.device)
    if not numbers.isfinite().all():
        raise ValueError("it holds numbers that are not finite: it is damaged, download it again")
    return numbers


def half(field: Tensor) -> Tensor:
    """Return fp16 factors (n, 1) of two bytes each (n, 2), in fp32."""
    return field.contiguous().view(torch.float16).float()


def signed(field: Tensor) -> Tensor:
    return field.contiguous().view(torch.int8).float()


def nibbles(field: Tensor, width: int) -> Tensor:
    """Return (n, 2 y): of each `width` bytes first their low halves, then their high ones."""
    groups = field.reshape(len(field), -1, 1, width)
    return torch.cat((groups & 0x0F, groups >> 4), dim=2).reshape(len(field), -1)


def bits(field: Tensor, count: int, width: int) -> Tensor:
    """Return (n, 8 / count * y): of each `width` bytes first their lowest `count` bits, then the next ones."""
    groups = field.reshape(len(field), -1, 1, width)
    parts = [(groups >> shift) & (2**count - 1) for shift in range(0, 8, count)]
    return torch.cat(parts, dim=2).reshape(len(field), -1)


def q8_0(blocks: Tensor) -> Tensor:
    d, q = blocks.split((2, 32), dim=1)
    return signed(q) * half(d)


def q4_0(blocks: Tensor) -> Tensor:
    d, q = blocks.split((2, 16), dim=1)
    return half(d) * (nibbles(q, 16).float() - 8)


def q4_1(blocks: Tensor) -> Tensor:
    d, m, q = blocks.split((2, 2, 16), dim=1)
    return half(d) * nibbles(q, 16).float() + half(m)


def q5_0(blocks: Tensor) -> Tensor:
    d, high, q = blocks.split((2, 4, 16), dim=1)
    return half(d) * (five_bits(q, high).float() - 16)


def q5_1(blocks: Tensor) -> Tensor:
    d, m, high, q = blocks.split((2, 2, 4, 16), dim=1)
    return half(d) * five_bits(q, high).float() + half(m)


def five_bits(low: Tensor, high: Tensor) -> Tensor:
    """Return (n, 32): bit i of the four bytes is the fifth bit of number i."""
    return nibbles(low, 16) | (bits(high, 1, 1) << 4)


def q4_k(blocks: Tensor) -> Tensor:
    d, m, scales, q = blocks.split((2, 2, 12, 128), dim=1)
    return scaled_and_shifted(d, m, scales, nibbles(q, 32))


def q5_k(blocks: Tensor) -> Tensor:
    d, m, scales, high, q = blocks.split((2, 2, 12, 32, 128), dim=1)
    return scaled_and_shifted(d, m, scales, nibbles(q, 32) | (bits(high, 1, 32) << 4))


def scaled_and_shifted(d: Tensor, m: Tensor, scales: Tensor, q: Tensor) -> Tensor:
    """Return (n, 256): each 32 numbers have a factor and a shift of six bits, eight of both packed into 12 bytes."""
    low, middle, high = scales.split(4, dim=1)
    factors = torch.cat((low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)), dim=1)
    shifts = torch.cat((middle & 0x3F, (high >> 4) | ((middle >> 2) & 0x30)), dim=1)
    d, m = (half(d) * factors.float())[:, :, None], (half(m) * shifts.float())[:, :, None]
    return (d * q.reshape(-1, 8, 32).float() - m).reshape(-1, 256)


def q6_k(blocks: Tensor) -> Tensor:
    low, high, scales, d = blocks.split((128, 64, 16, 2), dim=1)
    q = (nibbles(low, 64) | (bits(high, 2, 32) << 4)).float() - 32
    return ((half(d) * signed(scales))[:, :, None] * q.reshape(-1, 16, 16)).reshape(-1, 256)


FORMATS: dict[str, Blocks] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}
