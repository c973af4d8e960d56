"""What one worker has compiled, for all workers of a run: put into its output once, and taken from there.

Reading it may run code that is in it: an output in which others can write must not be used with `model.compile`.
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
    """The compile cache of a pipeline, joined with that of the run; `cache` None is a pipeline that compiles nothing.

    A run goes on without it, whatever becomes of it: it saves time alone.
    """

    def __init__(self, store: Store, cache: CompileCache | None) -> None:
        """Load what another worker has put into the run."""
        self._store = store
        self._cache = cache
        self._is_done = cache is None or self._load(cache)

    def share(self) -> None:
        """Put what was compiled into the run, at the first call, unless there was something to load."""
        if self._is_done or self._cache is None:
            return
        self._is_done = True
        key = key_of(self._cache)
        try:
            with suppress(AlreadyExists):
                if not self._store.exists(key) and (data := self._cache.save()):
                    self._store.put_if_absent(key, data)
        except StoreError as error:
            log.warning("what was compiled is not shared: %s", error)

    def _load(self, cache: CompileCache) -> bool:
        key = key_of(cache)
        try:
            cache.load(self._store.read(key))
        except NotFound:
            return False
        except (StoreError, ValueError) as error:
            log.warning("%s is not used, blocks are compiled again: %s", self._store.url(key), error)
            return False
        return True


def key_of(cache: CompileCache) -> str:
    """Return where in a run what is like this is kept."""
    return f"{COMPILE_CACHE}/{cache.name}"
