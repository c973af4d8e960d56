"""A cache of the most recently used results of a computation, limited in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


class Memo(Generic[_Value]):
    """The most recently used results by key, at most `max_bytes` together.

    Threads may share a Memo: two threads that need the same key at once may both compute it, and one result is kept.

    num_bytes: a function that returns the size of a result; a result must not be None.
    """

    def __init__(self, max_bytes: int, num_bytes: Callable[[_Value], int]) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = num_bytes
        self._lock = Lock()
        self._bytes = 0
        self._known: OrderedDict[Hashable, _Value] = OrderedDict()

    def find(self, key: Hashable) -> _Value | None:
        """Return the result of a key if it is cached, else None."""
        with self._lock:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            return self._known[key]

    def get(self, key: Hashable, compute: Callable[[], _Value]) -> _Value:
        """Return the result of a key: the cached one, else the result of `compute`, which is then cached."""
        kept = self.find(key)
        if kept is not None:
            return kept
        value = compute()
        with self._lock:
            if key not in self._known:
                self._known[key] = value
                self._bytes += self._num_bytes(value)
            while self._bytes > self._max_bytes:
                _, dropped = self._known.popitem(last=False)
                self._bytes -= self._num_bytes(dropped)
        return value
