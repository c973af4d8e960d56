"""Turns at one key of S3, for stores that ignore conditions.

One writer at a time looks whether the key is free, and takes it.

    _run/tmp/turns/HASH-OF-KEY/WRITER    the announcement of a writer, there while it waits for its turn and has it

Burns's algorithm for mutual exclusion, with an object for the bit of each writer: it announces itself and lists the
others. If one of a smaller name is there it withdraws and waits for that one, else it waits for those of larger names,
which withdraw when they see it, unless it is their turn. Needs reads after writes and lists after writes, as S3 has.

A writer that was killed leaves its announcement, which is waited for in vain, and is ignored after PATIENCE_S. So
is a writer that is held up for that long in its turn.
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

# The longest turn of another writer: a look-up and the end of an upload.
PATIENCE_S = 10.0
_POLL_S = 0.1


@asynccontextmanager
async def turn(fs: Any, path: str, folder: str) -> AsyncIterator[None]:
    """Wait until no other writer has its turn at a path, and have it. `folder` is that of the announcements."""
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
        with suppress(Exception):  # what stays is removed as a half-written file
            await fs._rm_file(f"{queue}/{name}")


class _Others:
    """The other writers in a queue, less those that were waited for in vain."""

    def __init__(self, fs: Any, queue: str, name: str) -> None:
        self._fs = fs
        self._queue = queue
        self._ignored = {name}

    async def some(self, are_meant: Callable[[str], bool]) -> set[str]:
        """Return the names of the writers that are meant."""
        paths = await with_few_retries(lambda: list_folder(self._fs, self._queue))
        return {other for path in paths if are_meant(other := path.rpartition("/")[2])} - self._ignored

    async def wait_for(self, are_meant: Callable[[str], bool]) -> None:
        """Wait until the writers that are meant are gone, or have had more time than a turn takes."""
        before, since = set[str](), time.monotonic()
        while there := await self.some(are_meant):
            if there != before:
                before, since = there, time.monotonic()
            elif time.monotonic() - since >= PATIENCE_S:
                self._ignored |= there
            await asyncio.sleep(_POLL_S)
