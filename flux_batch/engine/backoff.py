"""Pauses between attempts after a failure.

They are random, so that a thousand workers do not retry in the same second.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tenacity import RetryCallState, Retrying, wait_random_exponential

# A pause is drawn at random between half of the first pause and a limit that doubles with each failure in a row.
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 60.0


class Backoff:
    """The pauses of one worker, which grow until something succeeds."""

    def __init__(self, first_s: float = FIRST_PAUSE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._wait = wait_random_exponential(multiplier=first_s, min=first_s / 2, max=LONGEST_PAUSE_S)
        self._tries = RetryCallState(Retrying(), None, (), {})
        self._clock = clock
        self._until = 0.0

    @property
    def until(self) -> float:
        """The end of the pause, as a time of the clock."""
        return self._until

    @property
    def is_over(self) -> bool:
        """True if the pause has passed."""
        return self._clock() >= self._until

    def begin(self) -> float:
        """Begin the next pause. Returns: its length in seconds."""
        length = self._wait(self._tries)
        self._tries.attempt_number += 1
        self._until = self._clock() + length
        return length

    def reset(self) -> None:
        """Make the next pause short again."""
        self._tries.attempt_number = 1
