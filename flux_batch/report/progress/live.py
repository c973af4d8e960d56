"""The live display of a run on a terminal, from the first second on.

rich is imported only for a display, so that commands without one start quickly.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from flux_batch.redaction import plain_text
from flux_batch.report.progress.snapshot import Snapshot, duration

if TYPE_CHECKING:
    from rich.console import RenderableType

_REFRESHES_PER_S = 4
_NAME_WIDTH = 9


class LiveDisplay:
    """The display of a run's figures, drawn several times a second; `show` sets new figures."""

    def __init__(self, doing: str, price: float | None = None) -> None:
        """Begin without figures. doing: the text to show until there are some; price: of a GPU hour."""
        self._started = time.monotonic()
        self._doing = doing
        self._price = price
        self._now: Snapshot | None = None
        self._rows: Sequence[tuple[str, str]] | None = None

    def show(self, now: Snapshot, rows: Sequence[tuple[str, str]] | None = None) -> None:
        """Replace the figures. rows: shown below the bar in place of those of the figures."""
        self._now, self._rows = now, rows

    def __rich__(self) -> RenderableType:
        """Return the current display; rich calls this."""
        from rich.console import Group
        from rich.spinner import Spinner

        if self._now is None:
            return Spinner("line", f"{self._doing}, {duration(time.monotonic() - self._started)}")
        return Group(_bar(self._now), _table(self._now.rows(self._price) if self._rows is None else self._rows))


def _bar(now: Snapshot) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(width=_NAME_WIDTH)
    line.add_column(ratio=1)
    share = now.num_done / now.num_total if now.num_total else 0.0
    line.add_row(f"{100 * share:.1f} %", ProgressBar(total=max(1, now.num_total), completed=now.num_done))
    return line


def _table(rows: Sequence[tuple[str, str]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(width=_NAME_WIDTH)
    table.add_column(overflow="fold")
    for name, text in rows:
        style = {"failed": "red", "waiting": "yellow"}.get(name, "")
        table.add_row(Text(name, "bold"), Text(plain_text(text), style))
    return table


@contextmanager
def live_display(doing: str, price: float | None = None) -> Iterator[LiveDisplay]:
    """Draw a display on stderr while the block runs. Log lines appear above it; rich respects NO_COLOR and COLUMNS."""
    from rich.console import Console
    from rich.live import Live

    display = LiveDisplay(doing, price)
    live = Live(
        display,
        console=Console(stderr=True),
        refresh_per_second=_REFRESHES_PER_S,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )
    live.start(refresh=True)
    try:
        yield display
    finally:
        with suppress(OSError):  # the terminal was closed
            live.stop()
