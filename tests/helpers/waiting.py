"""Waits for events of other threads and processes, never for a guessed time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# A limit for hanging tests: no machine takes so long for any event that a test waits for.
PATIENCE_S = 240.0


def wait_until(is_so: Callable[[], bool], said: Callable[[], str] = str, timeout_s: float = PATIENCE_S) -> None:
    """Wait until `is_so` holds. Raises: AssertionError with the text of `said` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        asked = time.thread_time()
        if is_so():
            return
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain: {said()}"
        # Asking too often would take processor time from the process that is waited for.
        time.sleep(max(0.01, 5 * (time.thread_time() - asked)))


def when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Call a function in another thread as soon as a condition holds."""

    def watch() -> None:
        wait_until(condition)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread
