"""The retry policy of all operations: how often, how long, and what is called during a wait.

errors.py decides which errors of the storage are transient.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from copy import copy
from typing import Self, TypeVar

from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from tenacity import wait_random_exponential as full_jitter

from flux_batch.errors import Stopped, StoreError
from flux_batch.redaction import public_uri
from flux_batch.storage.errors import is_transient, said, translated

log = logging.getLogger(__name__)

ATTEMPTS = 5
# Attempts at one request of an operation that is itself retried.
_PART_ATTEMPTS = 3
# The limit of the wait before the second attempt, and the largest limit; it doubles with each attempt. A wait is drawn
# at random between zero and its limit, so that many workers do not retry at the same moment.
_FIRST_WAIT_S = 0.5
_MAX_WAIT_S = 30.0
# Failures for this long are an outage, however few they are: from then on `on_wait` is called.
_OUTAGE_AFTER_S = 2.0
# An outage is logged once, after this time; shorter waits are not logged.
_WARN_AFTER_S = 5.0
# A request may take this long even if the limit of the outage is over, so the wait may end that much late.
_LEAST_REQUEST_S = 5.0
# Seconds for a request that starts after the drain time of a stop: just finished images may still be staged.
_LATE_S = 3.0
# Seconds between calls of `on_wait` and `on_request`: a stop must not wait for an unavailable storage.
_POLL_S = 0.25

T = TypeVar("T")


class _Outage:
    """The clock of an outage, shared by all operations of a policy.

    It starts when the first failed attempt began, or at the last answer if that came later. A success ends it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = math.inf
        self._answered = -math.inf
        self._is_logged = False
        self.failures = 0

    @property
    def lasted_s(self) -> float:
        """The seconds of the present outage; 0 if there is none."""
        return max(0.0, time.monotonic() - self._began)

    def add_failure(self, began: float) -> None:
        """Count a failed attempt that began at `began`, by time.monotonic()."""
        with self._lock:
            self.failures += 1
            self._began = min(self._began, max(began, self._answered))

    def end(self) -> None:
        """Record that the storage answered."""
        self._answered = time.monotonic()
        if not self.failures:
            return
        with self._lock:
            if self._is_logged:
                log.warning("the storage is back after %.0f s", self.lasted_s)
            self._began, self.failures, self._is_logged = math.inf, 0, False

    def log_once(self, uri: str, error: BaseException, outage_s: float, tried_s: float) -> bool:
        """Log the reason for a long wait, once per outage. Returns: True if it is logged.

        tried_s: the seconds of this operation; it may fail alone while others succeed.
        """
        with self._lock:
            if self._is_logged:
                return True
            if max(tried_s, self.lasted_s) < _WARN_AFTER_S:
                return False
            self._is_logged = self.lasted_s >= _WARN_AFTER_S
        log.warning("%s: %s; waiting for the storage, for up to %.0f s", public_uri(uri), said(error), outage_s)
        return True


class RetryPolicy:
    """The number of attempts at an operation, and the longest outage that it waits out.

    If `outage_s` is 0, an operation with transient errors is tried `attempts` times. Otherwise all operations of a
    policy share one clock, and give up `outage_s` after the last success. After several failures, or a long one, a
    waiting thread calls `on_wait` every quarter of a second: a heartbeat, or a check for a stop. A thread whose request
    is running calls `on_request` at the same interval, with the seconds since its start. An exception of either ends
    the wait or the request.
    """

    def __init__(
        self,
        outage_s: float = 0.0,
        on_wait: Callable[[], None] | None = None,
        *,
        on_request: Callable[[float], None] | None = None,
        attempts: int | None = None,
        first_wait_s: float = _FIRST_WAIT_S,
    ) -> None:
        self.outage_s = outage_s
        self._on_wait = [on_wait] if on_wait else []
        self._on_request = [on_request] if on_request else []
        self._attempts = ATTEMPTS if attempts is None else attempts
        self._within_s = math.inf
        self._first_wait_s = first_wait_s
        self._outage = _Outage()

    def ended_by(self, on_wait: Callable[[], None], on_request: Callable[[float], None]) -> Self:
        """Return this policy with two more checks that may end an operation; both share one clock."""
        other = copy(self)
        other._on_wait = [*self._on_wait, on_wait]
        other._on_request = [*self._on_request, on_request]
        return other

    def waiting(self, outage_s: float) -> Self:
        """Return this policy with another longest outage, in seconds."""
        other = copy(self)
        other.outage_s = outage_s
        return other

    def with_attempts(self, most: int, within_s: float = math.inf) -> Self:
        """Return this policy with at most `most` attempts, none of which begins after `within_s` seconds."""
        other = copy(self)
        other._attempts, other._within_s = min(self._attempts, most), within_s
        return other

    def with_retries(self, uri: str, operation: str, function: Callable[[], T]) -> T:
        """Run one storage operation. Raises: StoreError, and exceptions of `on_wait` or of a bug in `function`."""
        began = time.monotonic()
        try:
            with translated(uri, operation):
                return self.retry(function, is_transient, uri)
        except StoreError as error:
            if error.__cause__ and is_transient(error.__cause__):
                error.waited_s = max(time.monotonic() - began, self._outage.lasted_s)
            raise

    def retry(self, function: Callable[[], T], is_transient: Callable[[BaseException], bool], uri: str = "") -> T:
        """Run any operation. Raises: the last error of `function`, or the first one that is not transient."""
        is_logged = False

        def log_wait(state: RetryCallState) -> None:
            nonlocal is_logged
            is_logged = is_logged or self._log(uri, state)

        def attempt() -> T:
            began = time.monotonic()
            try:
                result = function()
            except Exception as error:
                if is_transient(error):
                    self._outage.add_failure(began)
                elif isinstance(error, OSError):
                    self._outage.end()  # it has answered
                raise
            self._outage.end()
            return result

        retrying = Retrying(
            stop=self._gives_up,
            wait=full_jitter(multiplier=self._first_wait_s, max=_MAX_WAIT_S),
            retry=retry_if_exception(is_transient),
            before_sleep=log_wait,
            sleep=lambda seconds: self._sleep(seconds, retrying.statistics["attempt_number"]),
            reraise=True,
        )
        return retrying(attempt)

    def wait_for(self, request: Future[T]) -> T:
        """Wait for a request that runs in another thread. Returns: its result.

        Raises: its error, an exception of `on_request`, or TimeoutError if the outage has lasted `outage_s`.
        """
        began = time.monotonic()
        try:
            while not wait([request], _POLL_S).done:
                waited_s = time.monotonic() - began
                for check in self._on_request:
                    check(waited_s)
                is_over = 0 < self.outage_s <= self._outage.lasted_s
                if is_over and waited_s >= min(self.outage_s, _LEAST_REQUEST_S):
                    raise TimeoutError(f"no answer, and no other for {self._outage.lasted_s:.0f} s")
        except BaseException:
            request.cancel()
            raise
        return request.result()

    def _is_outage(self, attempts: int) -> bool:
        return max(attempts, self._outage.failures) >= self._attempts or self._outage.lasted_s >= _OUTAGE_AFTER_S

    def _gives_up(self, state: RetryCallState) -> bool:
        if not self.outage_s:
            return state.attempt_number >= self._attempts or (state.seconds_since_start or 0.0) >= self._within_s
        if self._outage.lasted_s >= self.outage_s:
            return self._is_outage(state.attempt_number)
        # Other operations succeed meanwhile, so only the time of this one counts.
        return state.attempt_number >= self._attempts and (state.seconds_since_start or 0.0) >= self.outage_s

    def _sleep(self, seconds: float, attempts: int) -> None:
        if self.outage_s:  # make the last attempt exactly when the time for the outage is over, not later
            seconds = min(seconds, max(0.0, self.outage_s - self._outage.lasted_s))
        until = time.monotonic() + seconds
        while True:
            if self._is_outage(attempts):
                for check in self._on_wait:
                    check()
            if (left := until - time.monotonic()) <= 0:
                return
            time.sleep(min(left, _POLL_S))

    def _log(self, uri: str, state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        if not self.outage_s or error is None:
            return False
        return self._outage.log_once(uri, error, self.outage_s, state.seconds_since_start or 0.0)


class WorkerStop:
    """A stop of a worker, which ends its waiting for storage.

    After the stop no operation waits for an outage to end. From `drain_s` later on, a request is given up once it has
    run for a few seconds; after the first that was given up, all others are given up at once.
    """

    def __init__(self, drain_s: float) -> None:
        self._drain_s = drain_s
        self._began = math.inf
        self._is_silent = False

    def request(self) -> None:
        """Record that a stop is requested."""
        self._began = time.monotonic()

    @property
    def is_requested(self) -> bool:
        """True once a stop is requested."""
        return self._began < math.inf

    def policy(self, outage_s: float, on_wait: Callable[[], None]) -> RetryPolicy:
        """Return a policy whose operations raise Stopped instead of waiting on after a stop."""
        return RetryPolicy(outage_s, on_wait).ended_by(self._check_wait, self._check_request)

    def _check_wait(self) -> None:
        if self.is_requested:
            raise Stopped("stopped while the storage is unavailable")

    def _check_request(self, waited_s: float) -> None:
        is_over = time.monotonic() - self._began >= self._drain_s and (self._is_silent or waited_s >= _LATE_S)
        self._is_silent |= is_over
        if is_over:
            raise Stopped("stopped while the storage does not answer")


async def with_few_retries(request: Callable[[], Awaitable[T]]) -> T:
    """Await a request that is part of an operation; retry transient errors a few times, with short waits."""

    async def attempt() -> T:  # tenacity awaits only coroutine functions, and `request` may be a lambda
        return await request()

    retrying = AsyncRetrying(
        stop=stop_after_attempt(_PART_ATTEMPTS),
        wait=full_jitter(multiplier=_FIRST_WAIT_S),
        retry=retry_if_exception(is_transient),
        reraise=True,
    )
    return await retrying(attempt)


def with_retries(uri: str, operation: str, function: Callable[[], T]) -> T:
    """Run one storage operation without waiting for an outage to end: for work that a run does not need."""
    return RetryPolicy().with_retries(uri, operation, function)
