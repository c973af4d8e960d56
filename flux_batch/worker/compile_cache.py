"""The compile cache of a run: one worker writes its compiled code into the output, all others read it.

Reading the cache may run code in it: do not use `model.compile` with an output that others can write to.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from flux_batch.errors import AlreadyExists, NotFound, StoreError
from flux_batch.output.paths import COMPILE_CACHE
from flux_batch.storage.store import Store
from flux_batch.worker.protocol import CompileCache

log = logging.getLogger(__name__)


class SharedCompileCache:
    """The compile cache of a pipeline, shared with the run; `cache` is None if nothing is compiled.

    The cache only saves time, so a run continues without it after an error.
    """

    def __init__(self, store: Store, cache: CompileCache | None) -> None:
        """Load the cache of the run, if another worker has written it."""
        self._store = store
        self._cache = cache
        self._is_done = cache is None or self._load(cache)

    def share(self) -> None:
        """Write the compiled code into the run once, unless it was loaded from there."""
        if self._is_done or self._cache is None:
            return
        self._is_done = True
        key = _key_of(self._cache)
        try:
            with suppress(AlreadyExists):
                if not self._store.exists(key) and (data := self._cache.save()):
                    self._store.put_if_absent(key, data)
        except StoreError as error:
            log.warning("compiled code is not shared: %s", error)

    def _load(self, cache: CompileCache) -> bool:
        key = _key_of(cache)
        try:
            cache.load(self._store.read(key))
        except NotFound:
            return False
        except (StoreError, ValueError) as error:
            log.warning("%s: not used, blocks are compiled again: %s", self._store.url(key), error)
            return False
        return True


def _key_of(cache: CompileCache) -> str:
    """Return the key of a cache in the run."""
    return f"{COMPILE_CACHE}/{cache.name}"
