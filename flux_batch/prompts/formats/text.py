"""Text files: one prompt per line, or blocks of prompts and negative prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

import pyarrow as pa

from flux_batch.prompts.formats.lines import LineTable, decoded, lines, not_utf8
from flux_batch.prompts.formats.table import BadRow, Row


class TextTable(LineTable):
    """A text file with one prompt per line; blank lines are skipped."""

    def schema(self) -> pa.Schema:
        """Return the only column."""
        return pa.schema([("prompt", pa.string())])

    @property
    def is_one_row(self) -> bool:
        """True if the file holds a single prompt."""
        with self.file.open_text() as text:
            return len(list(islice(self.starts(text), 2))) == 1

    def records(self, text: BinaryIO, offset: int = 0) -> Iterator[tuple[int, Row | BadRow]]:
        """Yield the prompt of each line."""
        for at, line in lines(text, offset):
            if line.strip():
                try:
                    yield at, {"prompt": decoded(line).strip()}
                except UnicodeDecodeError as error:
                    yield at, not_utf8(error)


class BlockTable(LineTable):
    """A text file of blocks, separated by lines of dashes.

    Each block has `positive: ...` and `negative: ...`, each over any number of lines. This is the prompt file of
    ltdrdata/ComfyUI-Inspire-Pack (prompts/example/prompt1.txt).
    """

    def schema(self) -> pa.Schema:
        """Return both columns."""
        return pa.schema([("prompt", pa.string()), ("negative_prompt", pa.string())])

    def starts(self, text: BinaryIO, offset: int = 0, line: int = 1) -> Iterator[tuple[int, int]]:
        """Yield the byte and the line where each block begins."""
        first = line if offset else 1
        return ((at, first + number) for at, number, _ in _blocks(text, offset))

    def records(self, text: BinaryIO, offset: int = 0) -> Iterator[tuple[int, Row | BadRow]]:
        """Yield both prompts of each block."""
        return ((at, _block(content)) for at, _, content in _blocks(text, offset))


def _blocks(text: BinaryIO, offset: int) -> Iterator[tuple[int, int, list[bytes]]]:
    """Yield the byte of each block, the number of lines before it, and its lines.

    The lines are counted from `offset`.
    """
    at = before = 0
    content: list[bytes] = []
    for number, (begin, line) in enumerate(lines(text, offset)):
        if re.fullmatch(rb"-{3,}", line.strip()):
            if content:
                yield at, before, content
            content = []
        elif line.strip():
            if not content:
                at, before = begin, number
            content.append(line)
    if content:
        yield at, before, content


def _block(content: list[bytes]) -> Row | BadRow:
    row: dict[str, list[str]] = {"prompt": [], "negative_prompt": []}
    field = "prompt"
    for line in content:
        try:
            text = decoded(line).strip()
        except UnicodeDecodeError as error:
            return not_utf8(error)
        if found := re.match(r"(positive|negative)\s*:", text, re.IGNORECASE):
            field = "prompt" if found[1].lower() == "positive" else "negative_prompt"
            text = text[found.end() :].strip()
        if text:
            row[field].append(text)
    return {name: " ".join(texts) or None for name, texts in row.items()}
