"""WebDataset tars of captions: members with the same key are one row."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any, Self

import pyarrow as pa

from flux_batch.errors import SourceError, one_line
from flux_batch.prompts.formats.file import PromptBytes, skip_to
from flux_batch.prompts.formats.json_lines import schema_of_rows
from flux_batch.prompts.formats.table import BadRow, Row, RowRange, check_whole_characters, ranges_from

# The suffixes of text members, and the column of each; the keys of a .json member are columns.
_TEXTS = {"txt": "prompt", "caption": "prompt", "text": "prompt"}
_MAX_TEXT_BYTES = 1 << 24


class TarTable:
    """A tar with members KEY.txt and KEY.json; other members, such as images, are not read."""

    def __init__(self, file: PromptBytes) -> None:
        self._file = file

    def schema(self, num_rows: int | None = None) -> pa.Schema:
        """Return the columns of the first `num_rows` rows, or of the whole file."""
        return schema_of_rows(row for _, _, row in islice(self._records(0), num_rows))

    def split(self, num_rows: int) -> Iterator[RowRange]:
        """Yield ranges of `num_rows` that cover the file; the last may be shorter.

        Raises: SourceError for a key whose members are not consecutive: they would be several rows with one id.
        """
        return ranges_from(self._starts(), num_rows)

    def stream(self, rows: RowRange, columns: Collection[str]) -> Iterator[Row | BadRow]:
        """Yield the rows of a range one by one."""
        for _, _, row in islice(self._records(rows.offset), rows.num_rows):
            yield row

    def each_of(self, rows: RowRange) -> list[RowRange]:
        """Return a range for each row of a range, with its byte."""
        found = islice(self._records(rows.offset), rows.num_rows)
        return list(ranges_from(((at, 0) for at, _, _ in found), 1, rows.start))

    def _starts(self) -> Iterator[tuple[int, int]]:
        """Yield the byte where each row begins, and 0 for its line."""
        met: set[str] = set()
        for at, key, _ in self._records(0):
            if key in met:
                raise SourceError(
                    f"{self._file.uri}: the members of {key!r} are not consecutive, or are there twice; write the file "
                    "with tar --sort=name"
                )
            met.add(key)
            yield at, 0

    def _records(self, offset: int) -> Iterator[tuple[int, str, Row | BadRow]]:
        """Yield the first byte, the key and the values of each row, from `offset` on."""
        with self._file.open_decompressed() as file:
            skip_to(file, offset)
            try:
                with tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as tar:
                    yield from ((offset + at, key, row) for at, key, row in _rows(tar))
            except tarfile.TarError as error:
                raise SourceError(f"{self._file.uri}: not a readable tar: {one_line(error)}") from error


class _Member(tarfile.TarInfo):
    """A member whose header is complete; tarfile reads a truncated header as the end of the file."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read a header. Raises: ReadError if the file ends within it."""
        if 0 < len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("the file ends within a header")
        return super().frombuf(buf, encoding, errors)


def _rows(tar: tarfile.TarFile) -> Iterator[tuple[int, str, Row | BadRow]]:
    at, row, key = 0, None, ""
    for member in tar:
        # tarfile keeps half a kB per member, and a tar may have millions. getmembers() would read to the end.
        tar.members.clear()  # type: ignore[attr-defined]
        folder, slash, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if not member.isfile() or not stem:
            continue
        if folder + slash + stem != key:
            if row is not None:
                yield at, key, row
            key, at, row = folder + slash + stem, member.offset, None
        found = _member(tar, member, suffix.lower())
        if found is not None:
            row = _joined(row or {"id": key}, found)
    if row is not None:
        yield at, key, row


def _joined(row: Row | BadRow, found: Row | BadRow) -> Row | BadRow:
    if isinstance(row, BadRow) or isinstance(found, BadRow):
        return row if isinstance(row, BadRow) else found
    return {**found, **{name: value for name, value in row.items() if name not in found or name == "prompt"}}


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> Row | BadRow | None:
    """Return the columns of a text member; None for other members."""
    if suffix not in (*_TEXTS, "json"):
        return None
    if member.size > _MAX_TEXT_BYTES:
        return BadRow(f"{member.name} has {member.size} bytes, which is too long for a caption")
    file = tar.extractfile(member)
    try:
        text = file.read().decode("utf-8-sig") if file else ""
        if suffix != "json":
            return {_TEXTS[suffix]: text.strip()}
        value: Any = json.loads(text)
        check_whole_characters(value)
    except (ValueError, RecursionError) as error:
        return BadRow(f"{member.name}: {one_line(error)}")
    return value if isinstance(value, dict) else BadRow(f"{member.name}: not a JSON object")
