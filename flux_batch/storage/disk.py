"""Steps of a write to a disk: the folder of a file, and its publishing under a name that must be free."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# The answers of file systems without hard links: FUSE mounts of buckets, FAT.
_NO_LINK_ERRNOS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

# Tries to make a folder that others remove.
_TRIES = 10


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; others may remove them meanwhile, as they are empty.

    Raises: FileNotFoundError where none can be made, NotADirectoryError for the name of a file.
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
    """Publish a file under a name that must be free: a hard link, or a look-up and a rename without them."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_LINK_ERRNOS:
            raise
        try:
            os.stat(target)  # os.path.exists would take a disk that errs for a free name
        except FileNotFoundError:
            os.replace(temporary, target)
        else:
            raise FileExistsError(target) from error
