"""A request to stop: made by a signal or a lost lease, read by whatever runs shards.

Knows no shard and no storage. It is one attribute and no lock, since a signal handler may interrupt any line of the
thread that would hold the lock.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from flux_batch.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# How often something that waits looks whether it was asked to stop.
LOOK_S = 0.2


class Stop:
    """Asks for an orderly end: no new shards, what is running is finished or put aside. May be called by any thread."""

    def __init__(self) -> None:
        self._reason = ""

    @property
    def reason(self) -> str:
        """Why to stop, as the start of a sentence; empty while nobody asks for it."""
        return self._reason

    @property
    def is_requested(self) -> bool:
        """Whether to stop."""
        return bool(self._reason)

    def request(self, reason: str) -> None:
        """Ask to stop; the first reason stays. Safe to call twice."""
        if not self._reason:
            self._reason = reason

    def check(self) -> None:
        """Raise Interrupted if somebody asked to stop."""
        if self._reason:
            raise Interrupted(f"{self._reason}; run the same command again")

    def sleep(self, seconds: float) -> None:
        """Wait. Raises: Interrupted as soon as somebody asks to stop."""
        until = time.monotonic() + seconds
        self.check()
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_S))
            self.check()


@contextmanager
def stopped_by_signals(stop: Stop) -> Iterator[None]:
    """Let the first SIGTERM or SIGINT ask for a stop, and the second leave at once with exit code 75.

    Must be entered in the main thread; puts the handlers that were there back.
    """
    first = ""

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal first
        name = signal.Signals(number).name
        if first:
            _say(f"{name} after {first}: leaving at once; what is committed stays, the same command goes on")
            os._exit(Interrupted.exit_code)
        first = name
        _say(f"{name}: finishing or putting aside what is being made; a second signal leaves at once")
        stop.request(f"stopped by {name}")

    before = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # as nohup sets
    for number in heeded:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in heeded.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _say(sentence: str) -> None:
    """Write to stderr past its buffer, which the handler may have interrupted."""
    with suppress(OSError):  # whoever read it may be gone; an error here would be instead of the stop
        os.write(2, f"flux-batch: {sentence}\n".encode())
