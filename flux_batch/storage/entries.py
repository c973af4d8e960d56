"""Listings of a folder on a disk or in an fsspec file system: the names in it with their sizes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

# A name and the size of the object in bytes; None for a folder.
Entry: TypeAlias = tuple[str, int | None]


def local_entries(folder: str, *, with_sizes: bool) -> Iterator[Entry]:
    """Yield the entries of a folder on a disk; without sizes, every object has 0 bytes.

    This is three times as fast as fsspec. Files that are removed during the listing are left out. Raises: OSError.
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
    """Yield the paths of all files under a folder on a disk; links to folders are yielded, not followed.

    Folders that are removed during the listing are left out. A folder that cannot be read raises OSError, where fsspec
    would leave it out.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                yield entry.path
            else:
                with suppress(FileNotFoundError):
                    yield from local_files(entry.path)


def listed_entries(folder: str, listed: Iterable[Mapping[str, Any]]) -> Iterator[Entry]:
    """Yield the entries of a folder from a detailed listing of fsspec.

    The listing may contain the folder itself, which is left out.
    """
    for each in listed:
        parent, _, name = each["name"].rstrip("/").rpartition("/")
        if parent == folder:
            yield name, int(each["size"]) if each["type"] == "file" else None
