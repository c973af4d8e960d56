"""How often and how long a storage operation is tried: one policy for all of them.

Knows time; which errors are worth a wait is said by errors.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, stop_all
from tenacity import wait_random_exponential as full_jitter

from flux_batch.errors import one_line
from flux_batch.redaction import public_uri
from flux_batch.storage.errors import is_transient, translated

log = logging.getLogger(__name__)

ATTEMPTS = 5
# The waits grow from this; each is drawn from zero to what it may be, so that many workers do not come back at once.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 30.0
# Silent while a wait is nothing to speak of; then a line in the log now and then, whatever number of threads wait.
SILENT_S, REPORT_S = 5.0, 30.0
# How often `on_wait` is called: a stop must not wait for a storage that is away.
LOOK_S = 1.0

T = TypeVar("T")


class Patience:
    """Tries operations at least ATTEMPTS times and for `seconds`, as long as their errors may pass by themselves.

    Once it has tried that often, `on_wait` is called every second or so, by the thread that waits: a sign of life. What
    it raises ends the wait.
    """

    def __init__(self, seconds: float = 0.0, on_wait: Callable[[], None] | None = None) -> None:
        self._seconds = seconds
        self._on_wait = on_wait
        self._reporting = threading.Lock()
        self._last_report: float | None = None

    def attempt(self, uri: str, operation: str, function: Callable[[], T]) -> T:
        """Run one storage operation. Raises: StoreErrors alone, and what `on_wait` and a bug in `function` raise."""
        retrying = Retrying(
            stop=stop_all(stop_after_attempt(ATTEMPTS), stop_after_delay(self._seconds)),
            wait=full_jitter(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            retry=retry_if_exception(is_transient),
            before_sleep=lambda state: self._report(uri, state),
            sleep=lambda seconds: self._sleep(seconds, is_long=retrying.statistics["attempt_number"] >= ATTEMPTS),
            reraise=True,
        )
        with translated(uri, operation):
            return retrying(function)

    def _sleep(self, seconds: float, *, is_long: bool) -> None:
        until = time.monotonic() + seconds
        while True:
            if is_long and self._on_wait:
                self._on_wait()
            if (left := until - time.monotonic()) <= 0:
                return
            time.sleep(min(left, LOOK_S))

    def _report(self, uri: str, state: RetryCallState) -> None:
        """Say what is waited for, if that takes long and was not just said."""
        now, waited_s = time.monotonic(), state.seconds_since_start or 0.0
        error = state.outcome.exception() if state.outcome else None
        if waited_s < SILENT_S or error is None:
            return
        with self._reporting:
            if self._last_report is not None and now - self._last_report < REPORT_S:
                return
            self._last_report = now
        log.warning("%s: %s; waiting for the storage, %.0f s so far", public_uri(uri), one_line(error), waited_s)


def attempt(uri: str, operation: str, function: Callable[[], T]) -> T:
    """Run one storage operation with little patience: for what is not in the middle of a run."""
    return Patience().attempt(uri, operation, function)
