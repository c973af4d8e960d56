"""Waiting for a storage that fails: who was refused rests, and the run gives up for now when nobody gets through."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

from flux_batch.errors import Interrupted

log = logging.getLogger(__name__)

# The first rest and the longest; in between they double. Each is cut at random to a half at most, so that a thousand
# workers do not come back in the same second.
FIRST_REST_S = 5.0
LONGEST_REST_S = 60.0


class Rest:
    """The pauses of one worker, longer each time until something succeeds."""

    def __init__(self, first_s: float = FIRST_REST_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._first_s = first_s
        self._clock = clock
        self._until = 0.0
        self._number = 0

    @property
    def is_over(self) -> bool:
        """Whether the pause has passed."""
        return self._clock() >= self._until

    def begin(self) -> float:
        """Begin the next pause. Returns: its length in seconds."""
        length = min(LONGEST_REST_S, self._first_s * 2.0 ** min(self._number, 10)) * random.uniform(0.5, 1)
        self._number += 1
        self._until = self._clock() + length
        return length

    def reset(self) -> None:
        """Let the next pause be a short one again."""
        self._number = 0


class Outage:
    """How long storage has failed everybody; any success ends it."""

    def __init__(self, longest_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest_s = longest_s
        self._clock = clock
        self._began: float | None = None

    def meet(self, what: str, message: str) -> None:
        """Take note of a failure. Raises: Interrupted when it has been nothing but failures for too long."""
        now = self._clock()
        if self._began is None:
            self._began = now
        lasted = now - self._began
        if lasted > self._longest_s:
            raise Interrupted(
                f"storage has failed for {lasted:.0f} s ({message}); run the same command again when it is back"
            )
        log.warning("%s: %s; it is tried again, for %.0f s more", what, message, self._longest_s - lasted)

    def end(self) -> None:
        """Take note of a success."""
        self._began = None
