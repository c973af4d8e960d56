"""A request to stop a run, made by a signal or a lost lease.

It has no lock, since a signal handler may interrupt the very thread that holds it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from flux_batch.errors import Interrupted
from flux_batch.logs import ENCODING

# A closed terminal sends SIGHUP.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Seconds between two checks for a stop request while waiting.
POLL_S = 0.2


class Stop:
    """A request for a clean end: no shard is begun, running ones are finished or put aside; thread-safe."""

    def __init__(self) -> None:
        self._reason = ""
        self._advice = ""
        self._requested = math.inf

    @property
    def reason(self) -> str:
        """The reason to stop, as the start of a sentence; empty while no stop is requested."""
        return self._reason

    @property
    def is_requested(self) -> bool:
        """True if a stop is requested."""
        return bool(self._reason)

    @property
    def advice(self) -> str:
        """The advice how to continue, as the end of a sentence."""
        return self._advice

    @property
    def since_s(self) -> float:
        """The seconds since a stop was requested; 0 without one."""
        return max(0.0, time.monotonic() - self._requested)

    def request(self, reason: str, advice: str = "run the same command again") -> None:
        """Request a stop. Safe to call twice: the first reason stays."""
        if not self._reason:
            self._requested = time.monotonic()
            self._advice = advice
            self._reason = reason

    def check(self, after_s: float = 0.0) -> None:
        """Raise Interrupted if a stop was requested, at least `after_s` seconds ago."""
        if self._reason and self.since_s >= after_s:
            raise Interrupted(f"{self._reason}; {self._advice}")

    def sleep(self, seconds: float) -> None:
        """Sleep for `seconds`. Raises: Interrupted as soon as a stop is requested."""
        until = time.monotonic() + seconds
        self.check()
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, POLL_S))
            self.check()


@contextmanager
def stopped_by_signals(stop: Stop) -> Iterator[None]:
    """Request a stop at the first SIGTERM, SIGINT or SIGHUP; exit with code 75 at the second.

    Must be entered in the main thread; restores the previous handlers.
    """
    first = ""

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal first
        name = signal.Signals(number).name
        if first:
            _write(f"{name} after {first}: exiting at once; committed work stays, the same command resumes the run")
            os._exit(Interrupted.exit_code)
        first = name
        _write(f"{name}: finishing or putting aside the current shards; a second signal exits at once")
        stop.request(f"stopped by {name}")

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    replaced = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # nohup sets it
    for number in replaced:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _write(sentence: str) -> None:
    """Write a line to stderr, as JSON if the log is JSON.

    It bypasses the buffer of sys.stderr, since the signal may have interrupted a write to it.
    """
    fields = {"levelname": "WARNING", "name": __name__, "message": sentence}
    line = json.dumps(fields) if os.environ.get(ENCODING) == "JSON" else f"flux-batch: {sentence}"
    with suppress(OSError):  # the reader may be gone, and an error here would prevent the stop
        os.write(2, f"{line}\n".encode())
