"""The entries directly in a folder, with the bytes of each: of a disk, or of a file system of fsspec."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

# A name and the bytes of the object; None for a folder.
Entry: TypeAlias = tuple[str, int | None]


def local_entries(folder: str, *, with_sizes: bool) -> Iterator[Entry]:
    """Yield the entries of a folder on a disk; without sizes an object has 0 bytes.

    Three times as fast as fsspec, and what is removed meanwhile is left out. Raises: OSError.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield entry.name, None
            elif not with_sizes:
                if entry.is_file():
                    yield entry.name, 0
            else:
                try:
                    size = entry.stat().st_size
                except FileNotFoundError:
                    continue
                yield entry.name, size


def local_files(folder: str) -> Iterator[str]:
    """Yield the paths of all files under a folder on a disk; a link to a folder is an entry that is not entered.

    fsspec leaves out what cannot be read; this leaves out what is removed meanwhile. Raises: OSError.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                yield entry.path
            else:
                with suppress(FileNotFoundError):
                    yield from local_files(entry.path)


def listed_entries(folder: str, listed: Iterable[Mapping[str, Any]]) -> Iterator[Entry]:
    """Yield the entries of a folder from what fsspec lists with details; it may list the folder itself."""
    for each in listed:
        parent, _, name = each["name"].rstrip("/").rpartition("/")
        if parent == folder:
            yield name, int(each["size"]) if each["type"] == "file" else None
