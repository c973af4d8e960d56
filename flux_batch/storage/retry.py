"""One policy for every operation that is tried again: how often, how long, and who is told meanwhile.

Knows time; errors.py knows which errors of storage may pass by themselves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, stop_all
from tenacity import wait_random_exponential as full_jitter

from flux_batch.errors import StoreError, one_line
from flux_batch.redaction import public_uri
from flux_batch.storage.errors import is_transient, translated

log = logging.getLogger(__name__)

ATTEMPTS = 5
# The longest waits before the second and before any later attempt. Each wait is drawn from zero to the longest, which
# doubles from attempt to attempt, so that many workers do not come back at once.
_FIRST_WAIT_S = 0.2
_MAX_WAIT_S = 30.0
# A warning follows the first after this time, whatever number of threads wait; short waits are not logged.
_WARN_AFTER_S = 5.0
_WARN_INTERVAL_S = 30.0
# The interval of calls of `on_wait`: a stop must not wait for a storage that is unavailable.
_POLL_S = 1.0

T = TypeVar("T")


class RetryPolicy:
    """The number of attempts at an operation, and the outage that it waits for.

    An operation is tried at least `attempts` times and for `outage_s`, as long as its errors are transient. After that
    many attempts, the waiting thread calls `on_wait` about every second: a heartbeat. Whatever it raises ends the
    wait.
    """

    def __init__(
        self,
        outage_s: float = 0.0,
        on_wait: Callable[[], None] | None = None,
        *,
        attempts: int | None = None,
        first_wait_s: float = _FIRST_WAIT_S,
    ) -> None:
        self._outage_s = outage_s
        self._on_wait = on_wait
        self._attempts = ATTEMPTS if attempts is None else attempts
        self._first_wait_s = first_wait_s
        self._warning = threading.Lock()
        self._last_warning: float | None = None

    def with_retries(self, uri: str, operation: str, function: Callable[[], T]) -> T:
        """Run one storage operation. Raises: StoreError, and whatever `on_wait` or a bug in `function` raises."""
        began = time.monotonic()
        try:
            with translated(uri, operation):
                return self.retry(function, is_transient, lambda state: self._warn(uri, state))
        except StoreError as error:
            if error.__cause__ and is_transient(error.__cause__):
                error.waited_s = time.monotonic() - began
            raise

    def retry(
        self,
        function: Callable[[], T],
        is_transient: Callable[[BaseException], bool],
        before_wait: Callable[[RetryCallState], None] | None = None,
    ) -> T:
        """Run any operation. Raises: the last error of `function`, or the first one that is not transient."""
        retrying = Retrying(
            stop=stop_all(stop_after_attempt(self._attempts), stop_after_delay(self._outage_s)),
            wait=full_jitter(multiplier=self._first_wait_s, max=_MAX_WAIT_S),
            retry=retry_if_exception(is_transient),
            before_sleep=before_wait,
            sleep=lambda seconds: self._sleep(
                seconds, is_outage=retrying.statistics["attempt_number"] >= self._attempts
            ),
            reraise=True,
        )
        return retrying(function)

    def _sleep(self, seconds: float, *, is_outage: bool) -> None:
        until = time.monotonic() + seconds
        while True:
            if is_outage and self._on_wait:
                self._on_wait()
            if (left := until - time.monotonic()) <= 0:
                return
            time.sleep(min(left, _POLL_S))

    def _warn(self, uri: str, state: RetryCallState) -> None:
        """Log the reason for a long wait, now and then."""
        now, waited_s = time.monotonic(), state.seconds_since_start or 0.0
        error = state.outcome.exception() if state.outcome else None
        if waited_s < _WARN_AFTER_S or error is None:
            return
        with self._warning:
            if self._last_warning is not None and now - self._last_warning < _WARN_INTERVAL_S:
                return
            self._last_warning = now
        log.warning("%s: %s; waiting for the storage, %.0f s so far", public_uri(uri), one_line(error), waited_s)


def with_retries(uri: str, operation: str, function: Callable[[], T]) -> T:
    """Run one storage operation, and wait for no outage: for work that a run does not depend on."""
    return RetryPolicy().with_retries(uri, operation, function)
