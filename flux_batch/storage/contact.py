"""The first contact with a store: whoever has never answered is more likely to have another address."""

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

# Attempts at the first request of all.
FIRST_ATTEMPTS = 3
# Seconds of silence after which a store is asked something small, and seconds that it then has for that.
SILENCE_S = 5.0


def first_contact(policy: RetryPolicy | None = None) -> RetryPolicy:
    """Return a policy for whoever has never answered: few attempts, and none after ten seconds."""
    return (policy or RetryPolicy()).waiting(0.0).with_attempts(FIRST_ATTEMPTS, 2 * SILENCE_S)


@dataclass
class Contact:
    """The facts that were learned of a store, shared by all copies of it."""

    is_made: bool = False
    deletes_many: bool = True
    _began: float = math.inf
    _question: Future[Any] | None = None

    def begin(self) -> None:
        """Record that a store that has never answered is asked for the first time."""
        self._began, self._question = time.monotonic(), None

    def check(self, ask: Callable[[], Future[Any]]) -> None:
        """Raise StoreError if a store has not answered anything for some seconds.

        ask: begins a small question, so that a long first request of a store that answers goes on.
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
    """Return whether a store has answered, be it with an error."""
    error = None if question.cancelled() else question.exception()
    return error is None or isinstance(error, FileNotFoundError) or status(error) is not None
