"""Waiting for what other threads and processes do: until it is so, and never for a guessed time."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(is_so: Callable[[], bool], said: Callable[[], str] = str, timeout_s: float = 60) -> None:
    """Wait until something is so; in vain, fail with what `said` gives."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain: {said()}"
        time.sleep(0.01)
