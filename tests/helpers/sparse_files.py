"""Checkpoints of any size that use no disk space: a header, then a hole that reads as zeros."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import gguf

SIZES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}
ALIGNMENT = 32
Shapes = Mapping[str, tuple[str, Sequence[int]]]


def sparse_safetensors(path: Path, tensors: Shapes) -> Path:
    """Write a safetensors file of zeros; tensors: name -> dtype, shape."""
    header: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + SIZES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def sparse_gguf(path: Path, tensors: Shapes) -> Path:
    """Write a GGUF file of zeros; tensors: name -> type, shape."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0)
    end = 0
    for name, (dtype, shape) in tensors.items():
        kind = gguf.GGMLQuantizationType[dtype]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape)) + dims
        header += struct.pack("<IQ", kind, end)
        end += -(-prod(shape) // block * size // ALIGNMENT) * ALIGNMENT
    with path.open("wb") as file:
        file.write(header)
        file.truncate(-(-len(header) // ALIGNMENT) * ALIGNMENT + end)
    return path
