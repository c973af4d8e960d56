"""Local disk for one shard at a time, and removal of killed workers' folders.

Knows folders and locks; does not know what is put there.
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

# A folder is locked a moment after it is made: until it is this old, it does not count as left behind.
YOUNG_S = 60.0
# Beside the files of a shard; the kernel releases the lock when the process dies.
_LOCK = ".lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make an empty folder under TMPDIR, which is locked until it is removed.

    Raises: DiskFull instead of the OSError that the code within raises when the disk is full.
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
    """Remove the folders whose process is gone: nobody holds their lock. Returns: their number."""
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
    """Return the folder of this user under TMPDIR: the folders of another user could not be swept.

    Raises: StoreRefused if somebody else took the name, who could then exchange our files.
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
    # A shard that one thread began another one finishes, and releases.
    return FileLock(folder / _LOCK, timeout=0, thread_local=False)
