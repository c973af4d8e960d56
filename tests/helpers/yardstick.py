"""The work of a call independent of the machine: processor time, in a unit measured on the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable


def work(call: Callable[[], object]) -> float:
    """Return the processor time of a call, in yards: a yard is 500,000 additions in Python.

    Other processes do not count, and a slow processor has a longer yard. This finds calls that take minutes, not calls
    that take twice as long.
    """
    before = yard_s()
    started = time.process_time()
    call()
    taken_s = time.process_time() - started
    return taken_s / max(before, yard_s())


def yard_s() -> float:
    """Return the current seconds of one yard."""
    started = time.process_time()
    total = 0
    for number in range(500_000):
        total += number
    return time.process_time() - started
