"""Local disk for one shard at a time, and the end of what killed workers left of theirs.

Knows folders and locks; does not know what is put there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flux_batch.errors import DiskFull, FluxBatchError, StoreRefused

# Between the making of a folder and its locking a moment passes, in which it must not count as left behind.
YOUNG_S = 60.0
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give an empty folder under TMPDIR, locked while it is in use and removed after it.

    Raises: DiskFull, in the place of what the code within raises when there is no more room.
    """
    home = _home()
    try:
        with tempfile.TemporaryDirectory(dir=home) as folder, _locked(Path(folder)):
            yield Path(folder)
    except OSError as error:
        if isinstance(error, FluxBatchError) or error.errno not in NO_ROOM:
            raise
        raise DiskFull(
            f"{home}: no room for the files of a shard ({error.strerror}); free some, or set TMPDIR to a larger disk"
        ) from error


def sweep_scratch() -> int:
    """Remove the folders whose process is gone: nobody holds their lock. Returns: how many there were."""
    stale = 0
    for folder in _home().iterdir():
        try:
            if time.time() - folder.stat().st_mtime < YOUNG_S:
                continue
            with _locked(folder):
                shutil.rmtree(folder, ignore_errors=True)
            stale += 1
        except OSError:  # in use, or another worker was quicker
            continue
    return stale


def _home() -> Path:
    """Keep each user's folders apart: another's could not be swept.

    Raises: StoreRefused if somebody else took the name, who could then exchange our files.
    """
    home = Path(tempfile.gettempdir()) / f"flux-batch-{os.getuid()}"
    with suppress(FileExistsError):
        home.mkdir(mode=0o700)
    found = home.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StoreRefused(f"{home}: is not a folder of this user; remove it, or set TMPDIR to another folder")
    return home


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which the kernel lets go of when the process dies. Raises: OSError if it is taken."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
