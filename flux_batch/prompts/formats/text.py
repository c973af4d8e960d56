"""Text files with one prompt a line, and with one prompt a file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

import pyarrow as pa

from flux_batch.prompts.formats.lines import LineTable, decoded, lines, not_utf8
from flux_batch.prompts.formats.table import BadRow, Row


class TextTable(LineTable):
    """A text file with one prompt a line; blank lines do not count."""

    def schema(self) -> pa.Schema:
        """Return the only column there is."""
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
