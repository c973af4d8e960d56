"""GGUF blocks are decoded bit for bit as by the package gguf."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_batch.model.checkpoint.gguf_blocks import DECODERS, dequantize
from flux_batch.model.checkpoint.gguf_header import QUANTIZED_DTYPES

# The places of the fp16 factors in a block, which must not be NaN or infinite.
FACTORS = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_rows(dtype: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Return packed rows of random bits, with finite fp16 factors of all magnitudes."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
    random = np.random.default_rng(seed)
    packed = random.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
    for offset in FACTORS.get(dtype, (0,)):
        factors = random.integers(0, 0x7C00, rows * blocks).astype(np.uint16)
        factors |= random.integers(0, 2, rows * blocks).astype(np.uint16) << 15
        packed[:, offset : offset + 2] = factors.view(np.uint8).reshape(-1, 2)
    return packed.reshape(rows, blocks * size)


@pytest.mark.parametrize("dtype", DECODERS)
@settings(max_examples=25)
@given(rows=st.integers(1, 20), blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_common_formats_are_those_of_the_package(dtype: str, rows: int, blocks: int, seed: int) -> None:
    packed = random_rows(dtype, rows, blocks, seed)
    expected = gguf.dequantize(packed, gguf.GGMLQuantizationType[dtype])
    actual = dequantize(torch.from_numpy(packed), dtype)
    assert actual.dtype == torch.float32
    # Compared as bits, so that -0.0 differs from 0.0.
    assert np.array_equal(actual.numpy().view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


@pytest.mark.parametrize("dtype", sorted(QUANTIZED_DTYPES))
def test_every_format_can_be_undone(dtype: str) -> None:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
    assert dequantize(torch.zeros(3, 2 * size, dtype=torch.uint8), dtype).shape == (3, 2 * block)


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_K", "IQ4_NL"])
def test_factors_that_are_no_numbers_are_refused(dtype: str) -> None:
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
    rows = torch.full((1, size), 0xFF, dtype=torch.uint8)
    with pytest.raises(ValueError, match="numbers that are not finite"):
        dequantize(rows, dtype)
