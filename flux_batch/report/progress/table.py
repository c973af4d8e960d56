"""Tables of names and texts: drawn with frames on a capable terminal, else written as plain lines."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO, TypeAlias

from flux_batch.redaction import plain_text

Rows: TypeAlias = Sequence[tuple[str, str]]
"""Names and texts; a row without a name continues the row above it."""

# Longer lines are hard to read.
_MAX_WIDTH = 120
_STYLES = {"failed": "red", "mind": "yellow", "waiting": "yellow"}
_STYLES |= dict.fromkeys(("REFUSED", "MISSING", "TOO MANY"), "bold red")


def can_draw(file: TextIO) -> bool:
    """Return whether a file is a terminal that can draw frames and move the cursor."""
    return file.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def write_table(sections: Iterable[Rows], file: TextIO | None = None) -> None:
    """Write the rows of each section, with a line between them. `file` is stdout by default."""
    file = file or sys.stdout
    filled = [rows for rows in sections if rows]
    if can_draw(file):
        _draw(filled, file)
    else:
        width = shutil.get_terminal_size().columns if file.isatty() else None
        file.write("\n\n".join("\n".join(_lines(rows, width)) for rows in filled) + "\n")
    file.flush()  # so that readers of a pipe see it now


def _draw(sections: Sequence[Rows], file: TextIO) -> None:
    """Draw sections with frames; rich respects NO_COLOR, and uses ASCII if the terminal has nothing else."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False)
    console.width = min(console.width, _MAX_WIDTH)
    table = Table(box=box.ROUNDED, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for rows in sections:
        style = ""
        for name, text in rows:
            style = _STYLES.get(name, "") if name else style
            table.add_row(Text(name, "bold"), Text(plain_text(text), style))
        table.add_section()
    console.print(table)


def _lines(rows: Rows, width: int | None) -> Iterator[str]:
    """Yield rows as lines, wrapped at a width; None does not wrap."""
    indent = 1 + max(9, *(len(name) for name, _ in rows))
    for name, text in rows:
        start = f"{name:<{indent}}"
        for line in plain_text(text).splitlines():
            wrapped = textwrap.wrap(line, max(20, width - indent - 1), break_on_hyphens=False) if width else [line]
            for part in wrapped:
                yield start + part
                start = " " * indent
