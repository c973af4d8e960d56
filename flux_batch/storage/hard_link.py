"""The publishing of a file on a disk under a name that must be free."""

from __future__ import annotations

import errno
import os

# The answers of file systems without hard links: FUSE mounts of buckets, FAT.
_NO_LINK_ERRNOS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


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
