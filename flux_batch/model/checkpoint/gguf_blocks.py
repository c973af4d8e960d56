"""Dequantization of GGUF blocks, bit for bit as the package `gguf` does it; the common formats on any device.

A block holds 32 or 256 consecutive numbers of a row as small integers q and one or two fp16 factors: d q, or d q - m.
Formats and field order: ggml-org/ggml, src/ggml-common.h. The arithmetic is in fp32, in the same order of operations.
Letters: n blocks, y bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import gguf
import torch
from torch import Tensor

_Decoder = Callable[[Tensor], Tensor]


def dequantize(rows: Tensor, dtype: str) -> Tensor:
    """Return the numbers (rows, columns) of packed rows (rows, bytes): uint8 to fp32, on the device of the rows.

    `dtype`: a GGUF type, such as Q4_K. Raises: ValueError for numbers that are not finite, a sign of a damaged file.
    """
    kind = gguf.GGMLQuantizationType[dtype]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    if dtype in DECODERS:
        numbers = DECODERS[dtype](rows.reshape(-1, size)).reshape(len(rows), -1)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numbers that are not finite raise below
            numbers = torch.from_numpy(gguf.dequantize(rows.cpu().numpy(), kind)).to(rows.device)
    if not numbers.isfinite().all():
        raise ValueError("it holds numbers that are not finite: it is damaged, download it again")
    return numbers


def _half(field: Tensor) -> Tensor:
    """Return fp16 factors as fp32: (n, 2) bytes -> (n, 1)."""
    return field.contiguous().view(torch.float16).float()


def _signed(field: Tensor) -> Tensor:
    """Return bytes (n, y) as signed integers, in fp32."""
    return field.contiguous().view(torch.int8).float()


def _nibbles(field: Tensor, width: int) -> Tensor:
    """Return (n, 2 y): the low halves of each `width` bytes, then their high halves."""
    groups = field.reshape(len(field), -1, 1, width)
    return torch.cat((groups & 0x0F, groups >> 4), dim=2).reshape(len(field), -1)


def _bits(field: Tensor, count: int, width: int) -> Tensor:
    """Return (n, 8 / count * y): the lowest `count` bits of each `width` bytes, then the next ones."""
    groups = field.reshape(len(field), -1, 1, width)
    parts = [(groups >> shift) & (2**count - 1) for shift in range(0, 8, count)]
    return torch.cat(parts, dim=2).reshape(len(field), -1)


def _q8_0(blocks: Tensor) -> Tensor:
    d, q = blocks.split((2, 32), dim=1)
    return _signed(q) * _half(d)


def _q4_0(blocks: Tensor) -> Tensor:
    d, q = blocks.split((2, 16), dim=1)
    return _half(d) * (_nibbles(q, 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    d, m, q = blocks.split((2, 2, 16), dim=1)
    return _half(d) * _nibbles(q, 16).float() + _half(m)


def _q5_0(blocks: Tensor) -> Tensor:
    d, high, q = blocks.split((2, 4, 16), dim=1)
    return _half(d) * (_five_bits(q, high).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    d, m, high, q = blocks.split((2, 2, 4, 16), dim=1)
    return _half(d) * _five_bits(q, high).float() + _half(m)


def _five_bits(low: Tensor, high: Tensor) -> Tensor:
    """Return numbers of five bits (n, 32): bit i of the four `high` bytes is the fifth of number i."""
    return _nibbles(low, 16) | (_bits(high, 1, 1) << 4)


def _q4_k(blocks: Tensor) -> Tensor:
    d, m, scales, q = blocks.split((2, 2, 12, 128), dim=1)
    return _scaled_and_shifted(d, m, scales, _nibbles(q, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    d, m, scales, high, q = blocks.split((2, 2, 12, 32, 128), dim=1)
    return _scaled_and_shifted(d, m, scales, _nibbles(q, 32) | (_bits(high, 1, 32) << 4))


def _scaled_and_shifted(d: Tensor, m: Tensor, scales: Tensor, q: Tensor) -> Tensor:
    """Return (n, 256): every 32 numbers share a factor and a shift of six bits, packed into 12 bytes of the block."""
    low, middle, high = scales.split(4, dim=1)
    factors = torch.cat((low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)), dim=1)
    shifts = torch.cat((middle & 0x3F, (high >> 4) | ((middle >> 2) & 0x30)), dim=1)
    d, m = (_half(d) * factors.float())[:, :, None], (_half(m) * shifts.float())[:, :, None]
    return (d * q.reshape(-1, 8, 32).float() - m).reshape(-1, 256)


def _q6_k(blocks: Tensor) -> Tensor:
    low, high, scales, d = blocks.split((128, 64, 16, 2), dim=1)
    q = (_nibbles(low, 64) | (_bits(high, 2, 32) << 4)).float() - 32
    return ((_half(d) * _signed(scales))[:, :, None] * q.reshape(-1, 16, 16)).reshape(-1, 256)


DECODERS: dict[str, _Decoder] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
