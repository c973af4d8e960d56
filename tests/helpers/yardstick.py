"""How much a call computes, whatever the machine is and does: processor time, in a unit measured beside it."""

from __future__ import annotations

import time
from collections.abc import Callable


def work(call: Callable[[], object]) -> float:
    """Return the processor time of a call in this process, in yards: half a million additions of Python are one.

    Other processes do not count, and a slow processor makes the yard longer too; what takes minutes is found, not what
    takes twice as long.
    """
    before = yard_s()
    started = time.process_time()
    call()
    taken_s = time.process_time() - started
    return taken_s / max(before, yard_s())


def yard_s() -> float:
    """Return the seconds of one yard, now."""
    started = time.process_time()
    total = 0
    for number in range(500_000):
        total += number
    return time.process_time() - started
