"""Encodings and compressions, recognised by the content and not by the name."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from flux_batch.errors import SourceError
from helpers.prompt_tables import read_all

TEXTS = {
    "p.txt": "a cat\na dog 🐈\nü\n",
    "p.jsonl": '{"prompt": "a cat"}\n{"prompt": "a dog 🐈"}\n{"prompt": "ü"}\n',
    "p.csv": 'prompt\na cat\n"a dog 🐈"\nü\n',
    "p.tsv": "prompt\na cat\na dog 🐈\nü\n",
    "p.json": '[{"prompt": "a cat"}, {"prompt": "a dog 🐈"}, "ü"]\n',
}
NAMES = pytest.mark.parametrize("name", TEXTS)
EXPECTED = [{"prompt": "a cat"}, {"prompt": "a dog 🐈"}, {"prompt": "ü"}]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@NAMES
@pytest.mark.parametrize(
    "encode",
    [
        lambda text: codecs.BOM_UTF16_LE + text.replace("\n", "\r\n").encode("utf-16-le"),
        lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
        lambda text: text.encode("utf-16-le"),
        lambda text: text.encode("utf-16-be"),
        lambda text: codecs.BOM_UTF32_LE + text.encode("utf-32-le"),
        lambda text: text.encode("utf-32-be"),
        lambda text: codecs.BOM_UTF8 + text.encode(),
        lambda text: text.replace("\n", "\r").encode(),
    ],
    ids=["16le", "16be", "16le bare", "16be bare", "32le", "32be bare", "8", "old Mac"],
)
def test_text_of_any_encoding_and_line_end(tmp_path: Path, name: str, encode: Callable[[str], bytes]) -> None:
    (tmp_path / name).write_bytes(encode(TEXTS[name]))

    assert read_all(tmp_path / name, 2) == EXPECTED


def test_half_a_character_at_the_end_of_utf16_fails_its_row(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("a\nb".encode("utf-16") + b"\x00")

    first, second = read_all(tmp_path / "p.txt", 1)

    assert first == {"prompt": "a"}
    assert not isinstance(second, dict)


@NAMES
@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_whatever_it_is_called(tmp_path: Path, name: str, suffix: str) -> None:
    data = COMPRESS[suffix](TEXTS[name].encode())
    for path in (tmp_path / f"{name}.{suffix}", tmp_path / name):
        path.write_bytes(data)
        assert read_all(path, 2) == EXPECTED


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_of_several_parts_and_of_more_than_a_buffer(tmp_path: Path, suffix: str) -> None:
    texts = [f"prompt {number} {'x' * 100}" for number in range(30_000)]
    half = len(texts) // 2
    parts = ("\n".join(part).encode() + b"\n" for part in (texts[:half], texts[half:]))
    (tmp_path / f"p.txt.{suffix}").write_bytes(b"".join(map(COMPRESS[suffix], parts)))

    found = read_all(tmp_path / f"p.txt.{suffix}", 10_000)

    assert [row["prompt"] for row in found if isinstance(row, dict)] == texts


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damaged_compression_names_the_file(tmp_path: Path, suffix: str) -> None:
    data = COMPRESS[suffix]("\n".join(str(number) * 9 for number in range(5000)).encode())
    (tmp_path / f"p.txt.{suffix}").write_bytes(data[: len(data) // 2])

    with pytest.raises(SourceError, match=rf"p\.txt\.{suffix}: its compression is damaged"):
        read_all(tmp_path / f"p.txt.{suffix}", 100)
