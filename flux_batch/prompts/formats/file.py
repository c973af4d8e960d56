"""The bytes of a prompts file: as stored, or decompressed and decoded to UTF-8 text.

This module recognises compressions and encodings by the first bytes, and does not know rows.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, BinaryIO, cast

import pyarrow as pa

from flux_batch.errors import SourceError, one_line
from flux_batch.storage.errors import status, translated
from flux_batch.storage.filesystem import open_filesystem

_BUFFER_BYTES = 1 << 20
# Enough to recognise a format, and to hold all of most files with one prompt.
_HEAD_BYTES = 4096
_COMPRESSIONS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"),
}
# UTF-32 comes first: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True)
class PromptBytes:
    """A prompts file; `head` has its first bytes, or all of them if `is_whole`."""

    uri: str
    storage_options: Mapping[str, Any]
    head: bytes
    is_whole: bool

    @classmethod
    def of(cls, uri: str, storage_options: Mapping[str, Any]) -> PromptBytes:
        """Read the first bytes of a file. Raises: StoreError."""
        fs, path = open_filesystem(uri, storage_options)
        with translated(uri, "read"):
            try:
                head = bytes(fs.cat_file(path, start=0, end=_HEAD_BYTES))
            except (OSError, ValueError) as error:
                if status(error) != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # the file is empty
                    raise
                head = b""
        return cls(uri, storage_options, head, len(head) != _HEAD_BYTES)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the stored bytes, to read and seek in."""
        if self.is_whole:
            yield io.BytesIO(self.head)
            return
        fs, path = open_filesystem(self.uri, self.storage_options)
        with translated(self.uri, "read"), fs.open(path, "rb") as file:
            if file.seekable():
                # Without a buffer, s3fs would copy a block of megabytes for every line.
                yield io.BufferedReader(file, _BUFFER_BYTES)
            else:  # a web server that does not send the length
                yield io.BytesIO(fs.cat_file(path))

    @contextmanager
    def open_text(self) -> Iterator[BinaryIO]:
        """Open the file's text as UTF-8, with lines that end in a line feed. Raises: SourceError for damage."""
        with self.open_decompressed() as file:
            yield _as_utf8(file)

    @contextmanager
    def open_decompressed(self) -> Iterator[BinaryIO]:
        """Open the decompressed bytes; an uncompressed file is unchanged. Raises: SourceError for damage."""
        with self.open() as stored:
            opener = next((opener for magic, opener in _COMPRESSIONS.items() if self.head.startswith(magic)), None)
            if opener is None:
                yield stored
                return
            try:
                yield cast(BinaryIO, io.BufferedReader(opener(stored), _BUFFER_BYTES))
            except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
                if isinstance(error, OSError) and not is_damage(error):
                    raise
                raise SourceError(f"{self.uri}: its compression is damaged: {one_line(error)}") from error


def is_damage(error: OSError) -> bool:
    """Return whether an error comes from a decoder; errors of the file system have an errno."""
    return type(error) in (OSError, gzip.BadGzipFile) and error.errno is None


def skip_to(file: BinaryIO, offset: int, at: int = 0) -> None:
    """Move a file from byte `at` to a later one; read if it cannot seek."""
    if file.seekable():
        file.seek(offset)
        return
    while at < offset and (data := file.read(min(offset - at, _BUFFER_BYTES))):
        at += len(data)


def _as_utf8(file: Any) -> BinaryIO:
    """Return a buffered file as UTF-8; its encoding is told by a byte order mark or by NULs.

    Carriage returns as line ends (old Mac OS) become line feeds.
    """
    head = file.peek(_BUFFER_BYTES) if isinstance(file, io.BufferedReader) else file.getvalue()[:_BUFFER_BYTES]
    if encoding := _wide_encoding(head):
        file = io.BufferedReader(_Decoded(file, encoding), _BUFFER_BYTES)
        head = file.peek(_BUFFER_BYTES)
    if b"\r" in head and b"\n" not in head:
        file = io.BufferedReader(_LineFeeds(file), _BUFFER_BYTES)
    return cast(BinaryIO, file)


def _wide_encoding(head: bytes) -> str | None:
    """Return the UTF-16 or UTF-32 encoding of a text, None for others.

    Without a byte order mark, the NULs in the first two characters tell it.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding
    is_null = [byte == 0 for byte in head[:8]]
    if is_null[:4] == [False, True, False, True]:
        return "utf-16-le"
    if is_null[:4] == [True, False, True, False]:
        return "utf-16-be"
    if is_null == [False, True, True, True] * 2:
        return "utf-32-le"
    if is_null == [True, True, True, False] * 2:
        return "utf-32-be"
    return None


class _Decoded(io.RawIOBase):
    """A file in another encoding as UTF-8; invalid characters become invalid UTF-8, and so fail their row."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder(encoding)("surrogatepass").decode
        self._left = b""
        self._is_at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left and not self._is_at_end:
            data = self._file.read(_BUFFER_BYTES)
            self._is_at_end = not data
            try:
                text = self._decode(data, final=self._is_at_end)
            except UnicodeDecodeError:
                text = "\udcff"  # the last character is truncated
            self._left = text.encode("utf-8", "surrogatepass")
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


class _LineFeeds(io.RawIOBase):
    """A file whose carriage returns are replaced by line feeds, without changing offsets."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer)).replace(b"\r", b"\n")
        buffer[: len(data)] = data
        return len(data)
