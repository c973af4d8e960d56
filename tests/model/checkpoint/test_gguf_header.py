"""The header of a GGUF file: read as by the package gguf, and one clear error for each defect."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_batch.model.checkpoint.gguf_header import read_gguf, stored_size
from helpers.layout_files import coarse_state, write_gguf
from helpers.yardstick import work

U32, U64, STRING, ARRAY = 4, 10, 8, 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with all header entries of real files."""
    folder = tmp_path_factory.mktemp("gguf")
    values = {"tokens": ["a", "b", "ü"], "scores": [0.5, -1.0], "token_type": [1, 2, 3]}
    return write_gguf(coarse_state(), folder / "model.gguf", "Q8_0", **values)


def test_tensors_are_found_where_the_package_finds_them(model: Path) -> None:
    tensors, words = read_gguf(model)
    reader = gguf.GGUFReader(model)
    assert words["general.architecture"] == "flux"
    expected = [(x.name, tuple(x.shape.tolist())[::-1], x.tensor_type.name, x.data_offset) for x in reader.tensors]
    assert [(x.name, x.shape, x.dtype, x.offset) for x in tensors] == expected
    assert {x.dtype for x in tensors} == {"F32", "Q8_0"}


def string(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(tensors: int = 0, values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def entry(name: str = "x", shape: Sequence[int] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<{len(shape)}Q", *shape)
    return string(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def aligned(data: bytes, body: int = 128, alignment: int = 32) -> bytes:
    return data + b"\0" * (-len(data) % alignment + body)


WRONG = {
    "nothing but a magic": (b"GGUF", "its header claims 4 bytes at 4"),
    "version 1": (header(version=1), "version 1 is not supported"),
    "big-endian": (header(version=3 << 24), "version 50331648 is not supported"),
    "absurd tensors": (header(tensors=2**63) + b"\0" * 500, "9223372036854775808 tensors"),
    "absurd values": (header(values=2**64 - 1) + b"\0" * 500, "18446744073709551615 values"),
    "many tensors in a short file": (header(tensors=50_000) + b"\0" * 500, r"its header claims \d+ bytes"),
    "absurd name": (header(tensors=1) + struct.pack("<Q", 2**62), "its header claims 4611686018427387904 bytes"),
    "absurd list": (
        header(values=1) + string("k") + struct.pack("<IIQ", ARRAY, U32, 2**62) + b"\0" * 500,
        "its header claims 18446744073709551616 bytes",
    ),
    "absurd list of texts": (
        header(values=1) + string("k") + struct.pack("<IIQ", ARRAY, STRING, 2**62) + b"\0" * 500,
        "its header claims 8 bytes",
    ),
    "lists of lists": (header(values=1) + string("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1), "lists of lists"),
    "unknown kind of value": (header(values=1) + string("k") + struct.pack("<I", 77), "77 is not a valid"),
    "name that is no text": (header(tensors=1) + struct.pack("<Q", 1) + b"\xff", "can't decode byte 0xff"),
    "many dimensions": (header(tensors=1) + entry(shape=(1,) * 5), "x has 5 dimensions"),
    "unknown type": (header(tensors=1) + entry(kind=999), "999 is not a valid GGMLQuantizationType"),
    "huge tensor": (aligned(header(tensors=1) + entry(shape=(2**40, 2**20))), "x ends beyond the 224 bytes"),
    "no whole blocks": (aligned(header(tensors=1) + entry(shape=(33,), kind=8)), "33 long, no multiple of the 32"),
    "packed number": (aligned(header(tensors=1) + entry(shape=(), kind=8)), "1 long, no multiple of the 32"),
    "offset beyond the end": (aligned(header(tensors=1) + entry(offset=2**40)), "x ends beyond"),
    "crooked offset": (aligned(header(tensors=1) + entry(offset=3)), "x is not aligned to 32 bytes"),
    "two of one name": (aligned(header(tensors=2) + entry() + entry()), "two tensors have one name"),
    "crooked alignment": (
        header(values=1) + string("general.alignment") + struct.pack("<II", U32, 3),
        "its alignment is 3 bytes",
    ),
    "no alignment": (
        header(values=1) + string("general.alignment") + struct.pack("<II", U32, 0),
        "its alignment is 0 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_damaged_headers_are_refused_at_once(tmp_path: Path, name: str) -> None:
    data, message = WRONG[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)

    def read() -> None:
        with pytest.raises(ValueError, match=rf"model\.gguf is cut short or damaged \(.*{message}.*download it again"):
            read_gguf(path)

    assert work(read) < 20


def test_a_tensor_that_just_fits_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(aligned(header(tensors=1) + entry()))
    assert read_gguf(path)[0][0].shape == (32,)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="x ends beyond"):
        read_gguf(path)


def test_another_alignment_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_custom_alignment(256)
    for name in ("a", "b"):
        writer.add_tensor(name, np.full(5, 2.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = [tensor.data_offset for tensor in gguf.GGUFReader(path).tensors]
    assert [tensor.offset for tensor in read_gguf(path)[0]] == expected


@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
def test_cut_anywhere_is_an_error(model: Path, share: float) -> None:
    data = model.read_bytes()
    cut = model.with_name("cut.gguf")
    cut.write_bytes(data[: max(4, int(len(data) * share))])
    with pytest.raises(ValueError, match=r"cut\.gguf is cut short or damaged"):
        read_gguf(cut)


@settings(max_examples=100)
@given(place=st.integers(4, 3000), byte=st.integers(0, 255))
def test_a_changed_byte_never_does_worse_than_an_error(model: Path, place: int, byte: int) -> None:
    data = bytearray(model.read_bytes())
    data[place] = byte
    changed = model.with_name("changed.gguf")
    changed.write_bytes(data)
    try:
        tensors, _ = read_gguf(changed)
    except ValueError as error:
        assert str(changed) in str(error)  # noqa: PT017 (most bytes may be anything)
    else:
        ends = [tensor.offset + stored_size(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors]
        assert all(end <= len(data) for end in ends)
