"""The header of a GGUF file: names, shapes, types and places of its tensors; knows no architecture.

The package `gguf` has the types and their sizes. Its own reader trusts the counts a file claims, and would loop until
the memory is full over a damaged one; here nothing is read or allocated that the file is not long enough to hold.
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
VERSIONS = (2, 3)
MAX_DIMS = 4
# Far above any model's, and low enough to be walked through in a moment.
MAX_TENSORS = 100_000
MAX_HEADER_SIZE = 128 * 2**20
DEFAULT_ALIGNMENT = 32
# The block formats that can be turned back into numbers; F32, F16, BF16 and F64 are normalized_key as in safetensors.
QUANTISED = frozenset({
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
})  # fmt: skip
SCALAR_SIZES = {
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
class GgufTensor:
    """One entry of the header. `shape`: rows first, as torch has it; `offset`: of its first byte in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int


class Cursor:
    """A place in the header that moves on with what is read, and never beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.end = min(len(data), MAX_HEADER_SIZE)
        self.place = 0

    def take(self, size: int) -> int:
        """Pass `size` bytes and return where they began. Raises: ValueError if there are not so many left."""
        start = self.place
        if size > self.end - start:
            raise ValueError(f"{size} bytes are said to follow byte {start} of a header that ends before {self.end}")
        self.place += size
        return start

    def number(self, kind: str) -> int:
        """Return a little-endian number; `kind` as struct has it."""
        value: int = struct.unpack_from(f"<{kind}", self.data, self.take(struct.calcsize(kind)))[0]
        return value

    def text(self) -> str:
        size = self.number("Q")
        start = self.take(size)
        return self.data[start : start + size].decode()


def read_gguf(path: Path) -> tuple[list[GgufTensor], dict[str, str]]:
    """Return the tensors of a GGUF file and what it says about itself in words.

    Raises: ValueError naming the file if it is damaged, or of a version or type that is not known.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return read_header(Cursor(data))
        except ValueError as error:
            raise ValueError(f"{path} is cut short or damaged ({error}): download it again") from error


def read_header(cursor: Cursor) -> tuple[list[GgufTensor], dict[str, str]]:
    cursor.take(len(GGUF_MAGIC))
    version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(f"GGUF version {version} is not known")
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    if max(tensor_count, value_count) > MAX_TENSORS:
        raise ValueError(f"{tensor_count} tensors and {value_count} values are said to follow")
    words: dict[str, str] = {}
    alignment = DEFAULT_ALIGNMENT
    for _ in range(value_count):
        key, value = cursor.text(), read_value(cursor)
        if key == "general.alignment" and isinstance(value, int):
            alignment = value
        elif isinstance(value, str):
            words[key] = value
    if alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"tensors are said to be aligned to {alignment} bytes")
    entries = [read_entry(cursor) for _ in range(tensor_count)]
    start = -(-cursor.place // alignment) * alignment
    tensors = [place(entry, start, alignment, len(cursor.data)) for entry in entries]
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two tensors have one name")
    return tensors, words


def read_value(cursor: Cursor) -> str | int | None:
    """Pass a value of the header and return it if it is a text or an unsigned integer; the others say nothing here."""
    kind = GGUFValueType(cursor.number("I"))
    if kind is GGUFValueType.STRING:
        return cursor.text()
    if kind is GGUFValueType.UINT32:
        return cursor.number("I")
    if kind is not GGUFValueType.ARRAY:
        cursor.take(SCALAR_SIZES[kind])
        return None
    kind, count = GGUFValueType(cursor.number("I")), cursor.number("Q")
    if kind is GGUFValueType.ARRAY:
        raise ValueError("it holds lists of lists")
    if kind is GGUFValueType.STRING:
        for _ in range(count):
            cursor.take(cursor.number("Q"))
    else:
        cursor.take(count * SCALAR_SIZES[kind])
    return None


def read_entry(cursor: Cursor) -> GgufTensor:
    """Read the description of a tensor; its offset still counts from the start of the data."""
    name, num_dims = cursor.text(), cursor.number("I")
    if num_dims > MAX_DIMS:
        raise ValueError(f"{name} is said to have {num_dims} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(num_dims))[::-1]
    kind = GGMLQuantizationType(cursor.number("I"))
    return GgufTensor(name, shape, kind.name, cursor.number("Q"))


def place(tensor: GgufTensor, start: int, alignment: int, file_size: int) -> GgufTensor:
    """Return the tensor with its offset in the file. Raises: ValueError if it does not lie there whole."""
    offset = start + tensor.offset
    if tensor.offset % alignment:
        raise ValueError(f"{tensor.name} is not aligned to {alignment} bytes")
    if offset + stored_size(tensor.name, tensor.shape, tensor.dtype) > file_size:
        raise ValueError(f"{tensor.name} is said to end beyond the {file_size} bytes of the file")
    return GgufTensor(tensor.name, tensor.shape, tensor.dtype, offset)


def stored_size(name: str, shape: tuple[int, ...], dtype: str) -> int:
    """Return the bytes of a tensor. Raises: ValueError if its rows are no whole blocks."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    length = shape[-1] if shape else 1
    if length % block:
        raise ValueError(f"the rows of {name} are {length} long, no multiple of the {block} of {dtype}")
    return prod(shape) // block * size
