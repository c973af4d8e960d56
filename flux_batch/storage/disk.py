"""Steps of a write to a disk: make the folder of a file, and publish a file under a free name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# Errors of file systems without hard links: FUSE mounts of buckets, FAT.
_NO_LINK_ERRNOS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

# Attempts to make a folder while other processes remove its parents.
_TRIES = 10


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, even while other processes remove them as empty folders.

    Raises: FileNotFoundError where no folder can be made, NotADirectoryError if the name is that of a file.
    """
    for left in reversed(range(_TRIES)):
        try:
            return folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            if folder.exists():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
        except FileNotFoundError:
            if not left:
                raise
    raise ConnectionError(f"{folder}: is removed again and again")


def create(temporary: str, target: str) -> None:
    """Publish a file under a name that must be free: by a hard link, or by a look-up and a rename."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_LINK_ERRNOS:
            raise
        try:
            os.stat(target)  # os.path.exists would return False for a disk error
        except FileNotFoundError:
            os.replace(temporary, target)
        else:
            raise FileExistsError(target) from error
