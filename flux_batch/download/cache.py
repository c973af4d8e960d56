"""The cache on this machine: where it is, and one process at a time in a part of it; knows nothing of its contents."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Two processes that start together differ by less; whoever waits longer should see why.
PATIENCE_S = 5.0

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return where this package may keep files: FLUX_BATCH_CACHE, else `flux-batch` in the user's cache."""
    if own := os.environ.get("FLUX_BATCH_CACHE"):
        return Path(own).expanduser()
    users = os.environ.get("XDG_CACHE_HOME")
    return (Path(users) if users else Path.home() / ".cache") / "flux-batch"


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file, as the only process of this machine; its death frees it. `what` is named if it has to wait."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=PATIENCE_S)
    except Timeout:
        log.info("waiting for the process that %s", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
