"""A lock on one key of S3, for stores that ignore conditional writes.

Only the writer that has its turn checks that the key is free, and writes it.

    _run/tmp/turns/HASH-OF-KEY/WRITER    exists while WRITER waits for its turn or has it

This is Burns's algorithm for mutual exclusion, with one object as the flag of each writer. A writer creates its flag
and lists the others. If there are flags with smaller names, it removes its own, waits until they are gone, and starts
again. Otherwise it waits until all flags with larger names are gone: their writers either remove them, or have the
turn and end it. The store must list an object as soon as it is written, as S3 does.

The flag of a killed writer stays: others wait for it for PATIENCE_S, then ignore it. They also ignore a live writer
whose turn takes longer than that.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from flux_batch.storage.retry import with_few_retries
from flux_batch.storage.s3 import list_folder

# A turn is a look-up and the completion of an upload. Other writers wait at most this long for its end.
PATIENCE_S = 10.0
_POLL_S = 0.1


@asynccontextmanager
async def turn(fs: Any, path: str, folder: str) -> AsyncIterator[None]:
    """Wait for this writer's turn at a path, and hold it. `folder` holds the flags."""
    name = uuid.uuid4().hex
    queue = f"{folder}/{hashlib.sha256(path.encode()).hexdigest()[:32]}"
    others = _Others(fs, queue, name)
    try:
        while True:
            await with_few_retries(lambda: fs._pipe_file(f"{queue}/{name}", b""))
            if not await others.some(lambda other: other < name):
                break
            await fs._rm_file(f"{queue}/{name}")
            await others.wait_for(lambda other: other < name)
        await others.wait_for(lambda other: other > name)
        yield
    finally:
        with suppress(Exception):  # a flag that stays is removed with the half-written files
            await fs._rm_file(f"{queue}/{name}")


class _Others:
    """The other writers at a key, without those that took longer than PATIENCE_S."""

    def __init__(self, fs: Any, queue: str, name: str) -> None:
        self._fs = fs
        self._queue = queue
        self._ignored = {name}

    async def some(self, are_meant: Callable[[str], bool]) -> set[str]:
        """Return the names of the writers for which `are_meant` is true."""
        paths = await with_few_retries(lambda: list_folder(self._fs, self._queue))
        return {other for path in paths if are_meant(other := path.rpartition("/")[2])} - self._ignored

    async def wait_for(self, are_meant: Callable[[str], bool]) -> None:
        """Wait until these writers are gone, or have been there unchanged for PATIENCE_S."""
        before, since = set[str](), time.monotonic()
        while there := await self.some(are_meant):
            if there != before:
                before, since = there, time.monotonic()
            elif time.monotonic() - since >= PATIENCE_S:
                self._ignored |= there
            await asyncio.sleep(_POLL_S)
