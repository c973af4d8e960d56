"""A temporary folder for the files of a shard, and removal of killed workers' folders.

This module knows folders and locks, not their contents.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from flux_batch.errors import DiskFull, FluxBatchError, StoreRefused
from flux_batch.storage.errors import FULL_ERRNOS

# A folder is locked a moment after it is made. A younger folder without a lock may belong to a live process.
YOUNG_S = 60.0
# The lock file lies beside the files of a shard; the kernel releases the lock when the process dies.
_LOCK = ".lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make an empty folder under TMPDIR, locked until it is removed.

    Raises: DiskFull in place of an OSError for a full disk, also one raised inside the `with` block.
    """
    root = _root()
    try:
        with tempfile.TemporaryDirectory(dir=root) as folder, _locked(Path(folder)):
            files = Path(folder) / "files"
            files.mkdir()
            yield files
    except OSError as error:
        if isinstance(error, FluxBatchError) or error.errno not in FULL_ERRNOS:
            raise
        raise DiskFull(
            f"{root}: no room for the files of a shard ({error.strerror}); free some, or set TMPDIR to a larger disk"
        ) from error


def sweep_scratch() -> int:
    """Remove the folders that no process holds locked. Returns: their number."""
    stale = 0
    for folder in _root().iterdir():
        try:
            if time.time() - folder.stat().st_mtime < YOUNG_S:
                continue
            with _locked(folder):
                shutil.rmtree(folder, ignore_errors=True)
            stale += 1
        except OSError:  # in use, or another worker was quicker
            continue
    return stale


def _root() -> Path:
    """Return this user's folder under TMPDIR; another user's folders could not be removed.

    Raises: StoreRefused if the folder belongs to another user, who could replace our files.
    """
    root = Path(tempfile.gettempdir()) / f"flux-batch-{os.getuid()}"
    with suppress(FileExistsError):
        root.mkdir(mode=0o700)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StoreRefused(f"{root}: is not a folder of this user; remove it, or set TMPDIR to another folder")
    return root


def _locked(folder: Path) -> FileLock:
    """Return the lock of a folder; entering it raises an OSError if another process holds it."""
    # One thread acquires the lock when it begins a shard, another releases it when it finishes the shard.
    return FileLock(folder / _LOCK, timeout=0, thread_local=False)
