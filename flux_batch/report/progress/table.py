"""Tables of names and texts: drawn on a terminal that can, as plain lines in a pipe, a file or a simple terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO, TypeAlias

from flux_batch.redaction import plain_text

Rows: TypeAlias = Sequence[tuple[str, str]]
"""Names and texts; a row without a name goes on with the one above it."""

# Longer lines are hard to read.
_MAX_WIDTH = 120
_STYLES = {"failed": "red", "mind": "yellow", "waiting": "yellow"}
_STYLES |= dict.fromkeys(("REFUSED", "MISSING", "TOO MANY"), "bold red")


def can_draw(file: TextIO) -> bool:
    """Return whether a file is a terminal that can draw lines and move in them."""
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
    file.flush()  # whoever reads a pipe sees it now


def _draw(sections: Sequence[Rows], file: TextIO) -> None:
    """Draw sections with frames; rich keeps to NO_COLOR, and to ASCII where a terminal has no more."""
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
    """Yield rows as lines, wrapped below each other at a width; as they are without one."""
    indent = 1 + max(9, *(len(name) for name, _ in rows))
    for name, text in rows:
        start = f"{name:<{indent}}"
        for line in plain_text(text).splitlines():
            wrapped = textwrap.wrap(line, max(20, width - indent - 1), break_on_hyphens=False) if width else [line]
            for part in wrapped:
                yield start + part
                start = " " * indent
