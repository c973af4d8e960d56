"""The first contact with a store; one that has never answered probably has a wrong address, so give up early."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from flux_batch.errors import StoreError
from flux_batch.storage.errors import status
from flux_batch.storage.retry import RetryPolicy

# Attempts at the first request to a store.
FIRST_ATTEMPTS = 3
# Seconds without an answer after which a small request is sent, and seconds in which that one must be answered.
SILENCE_S = 5.0


def first_contact(policy: RetryPolicy | None = None) -> RetryPolicy:
    """Return a policy for a server that has never answered: few attempts, none after ten seconds."""
    return (policy or RetryPolicy()).waiting(0.0).with_attempts(FIRST_ATTEMPTS, 2 * SILENCE_S)


@dataclass
class Contact:
    """The facts learned about a store, shared by all copies of its Store object.

    is_made: True once the store has answered. deletes_many: False if it refuses to delete many objects in one request.
    """

    is_made: bool = False
    deletes_many: bool = True
    _began: float = math.inf
    _question: Future[Any] | None = None

    def begin(self) -> None:
        """Record the start of a request to a store that has never answered."""
        self._began, self._question = time.monotonic(), None

    def check(self, ask: Callable[[], Future[Any]]) -> None:
        """Raise StoreError if a store has answered nothing for some seconds.

        ask: starts a small request. Its answer proves that the store is there, so a long first request may continue.
        """
        silent_s = time.monotonic() - self._began
        if self.is_made or silent_s < SILENCE_S:
            return
        if self._question is None:
            self._question = ask()
        elif self._question.done() and _is_answer(self._question):
            self.is_made = True
        elif silent_s >= 2 * SILENCE_S:
            self._question.cancel()
            raise StoreError("no answer") from TimeoutError(f"no answer for {silent_s:.0f} s")


def _is_answer(question: Future[Any]) -> bool:
    """Return whether a store has answered the request, even with an error."""
    error = None if question.cancelled() else question.exception()
    return error is None or isinstance(error, FileNotFoundError) or status(error) is not None
