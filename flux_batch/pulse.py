"""The sign of life of a worker: when it last got on with its work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pulse:
    """Remembers the last sign of progress; one attribute, so that any thread may give and read it."""

    def __init__(self) -> None:
        self._last: float | None = None

    def beat(self) -> None:
        """Give a sign of progress."""
        if self._last is not None:
            self._last = time.monotonic()

    def quiet_s(self) -> float:
        """Tell how long ago the last sign was, in seconds; 0 while there is nothing to do."""
        last = self._last
        return 0.0 if last is None else time.monotonic() - last

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Expect signs of progress from now until the work is done."""
        self._last = time.monotonic()
        try:
            yield
        finally:
            self._last = None
