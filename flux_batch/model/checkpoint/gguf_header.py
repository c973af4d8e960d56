"""The header of a GGUF file: names, shapes, types and offsets of its tensors.

The types and their sizes come from the package `gguf`. The package's own reader is not used, since it trusts the counts
in a file: a damaged file of 96 bytes makes it fill the memory. This reader checks every count against the file size.
Source of the format: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

GGUF_MAGIC = b"GGUF"
_GGUF_VERSIONS = (2, 3)
_MAX_DIMS = 4
# Far more than any model has, and few enough to be read in a moment.
_MAX_TENSORS = 100_000
_MAX_HEADER_SIZE = 128 * 2**20
_DEFAULT_ALIGNMENT = 32
# The block formats that can be dequantized; F32, F16, BF16 and F64 are named as in safetensors.
QUANTIZED_DTYPES = frozenset({
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
})  # fmt: skip
_SCALAR_SIZES = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}


@dataclass(frozen=True, slots=True)
class _GgufTensor:
    """A tensor in the header. `shape`: rows first, as in torch; `offset`: the file position of its first byte."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int


class _Cursor:
    """A position in the header; every read advances it, never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.end = min(len(data), _MAX_HEADER_SIZE)
        self.offset = 0

    def take(self, size: int) -> int:
        """Skip `size` bytes and return the offset of the first. Raises: ValueError if fewer are left."""
        start = self.offset
        if size > self.end - start:
            raise ValueError(f"its header claims {size} bytes at {start}, and ends at {self.end}")
        self.offset += size
        return start

    def number(self, kind: str) -> int:
        """Read a little-endian number; `kind` is a format character of struct."""
        value: int = struct.unpack_from(f"<{kind}", self.data, self.take(struct.calcsize(kind)))[0]
        return value

    def text(self) -> str:
        """Read a text with its length before it."""
        size = self.number("Q")
        start = self.take(size)
        return self.data[start : start + size].decode()


def read_gguf(path: Path) -> tuple[list[_GgufTensor], dict[str, str]]:
    """Read the header of a GGUF file. Returns: its tensors, and the metadata whose values are texts.

    Raises: ValueError with the file's name if it is damaged, or of an unknown version or type.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _read_header(_Cursor(data))
        except ValueError as error:
            raise ValueError(f"{path} is cut short or damaged ({error}): download it again") from error


def _read_header(cursor: _Cursor) -> tuple[list[_GgufTensor], dict[str, str]]:
    cursor.take(len(GGUF_MAGIC))
    version = cursor.number("I")
    if version not in _GGUF_VERSIONS:
        raise ValueError(f"GGUF version {version} is not supported")
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    if max(tensor_count, value_count) > _MAX_TENSORS:
        raise ValueError(f"its header claims {tensor_count} tensors and {value_count} values")
    metadata: dict[str, str] = {}
    alignment = _DEFAULT_ALIGNMENT
    for _ in range(value_count):
        key, value = cursor.text(), _read_value(cursor)
        if key == "general.alignment" and isinstance(value, int):
            alignment = value
        elif isinstance(value, str):
            metadata[key] = value
    if alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment} bytes, should be a power of two from 8")
    entries = [_read_entry(cursor) for _ in range(tensor_count)]
    start = -(-cursor.offset // alignment) * alignment
    tensors = [_locate(entry, start, alignment, len(cursor.data)) for entry in entries]
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two tensors have one name")
    return tensors, metadata


def _read_value(cursor: _Cursor) -> str | int | None:
    """Read a text or an unsigned integer of the header; skip any other value and return None."""
    kind = GGUFValueType(cursor.number("I"))
    if kind is GGUFValueType.STRING:
        return cursor.text()
    if kind is GGUFValueType.UINT32:
        return cursor.number("I")
    if kind is not GGUFValueType.ARRAY:
        cursor.take(_SCALAR_SIZES[kind])
        return None
    kind, count = GGUFValueType(cursor.number("I")), cursor.number("Q")
    if kind is GGUFValueType.ARRAY:
        raise ValueError("it holds lists of lists")
    if kind is GGUFValueType.STRING:
        for _ in range(count):
            cursor.take(cursor.number("Q"))
    else:
        cursor.take(count * _SCALAR_SIZES[kind])
    return None


def _read_entry(cursor: _Cursor) -> _GgufTensor:
    """Read the description of a tensor, with its offset from the start of the data."""
    name, num_dims = cursor.text(), cursor.number("I")
    if num_dims > _MAX_DIMS:
        raise ValueError(f"{name} has {num_dims} dimensions, should have {_MAX_DIMS} at most")
    shape = tuple(cursor.number("Q") for _ in range(num_dims))[::-1]
    kind = GGMLQuantizationType(cursor.number("I"))
    return _GgufTensor(name, shape, kind.name, cursor.number("Q"))


def _locate(tensor: _GgufTensor, start: int, alignment: int, file_size: int) -> _GgufTensor:
    """Return the tensor with its offset in the file. Raises: ValueError if it ends beyond the file."""
    offset = start + tensor.offset
    if tensor.offset % alignment:
        raise ValueError(f"{tensor.name} is not aligned to {alignment} bytes")
    if offset + stored_size(tensor.name, tensor.shape, tensor.dtype) > file_size:
        raise ValueError(f"{tensor.name} ends beyond the {file_size} bytes of the file")
    return _GgufTensor(tensor.name, tensor.shape, tensor.dtype, offset)


def stored_size(name: str, shape: tuple[int, ...], dtype: str) -> int:
    """Return the size of a tensor in bytes. Raises: ValueError for rows that are not whole blocks."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    length = shape[-1] if shape else 1
    if length % block:
        raise ValueError(f"the rows of {name} are {length} long, no multiple of the {block} of {dtype}")
    return prod(shape) // block * size
