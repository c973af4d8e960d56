"""Waiting for what other threads and processes do: until it is so, and never for a guessed time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# A bound on what hangs: no machine takes so long for what any test waits for.
PATIENCE_S = 240.0


def wait_until(is_so: Callable[[], bool], said: Callable[[], str] = str, timeout_s: float = PATIENCE_S) -> None:
    """Wait until something is so; in vain, fail with what `said` gives."""
    deadline = time.monotonic() + timeout_s
    while True:
        asked = time.thread_time()
        if is_so():
            return
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain: {said()}"
        # To ask must not keep what is waited for from the processor, as asking a server again and again would.
        time.sleep(max(0.01, 5 * (time.thread_time() - asked)))


def when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Act from another thread as soon as a condition holds."""

    def watch() -> None:
        wait_until(condition)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread
