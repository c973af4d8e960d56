"""Local disk for one shard at a time, and the end of what killed workers left of theirs.

Knows folders and locks; does not know what is put there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Between the making of a folder and its locking a moment passes, in which it must not count as left behind.
YOUNG_S = 60.0


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give an empty folder under TMPDIR, locked while it is in use and removed after it."""
    with tempfile.TemporaryDirectory(dir=_home()) as folder, _locked(Path(folder)):
        yield Path(folder)


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
    """Keep each user's folders apart: another's could not be swept."""
    home = Path(tempfile.gettempdir()) / f"flux-batch-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
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
