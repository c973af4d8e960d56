"""Some of the images that a run has stored, read one by one and, of tars and Parquet files, about where they lie.

The name of a file tells its layout (layouts.py), so that nothing but the metadata is needed to find an image.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.parquet as pq

from flux_batch.storage.store import Store

# One request to a bucket has at least this much; a tar has two small members and three headers between two images.
BLOCK = 64 << 10


def read_images(store: Store, file_name: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    """Yield key and encoded bytes of each image of `sizes` that a data file holds, in the file's order.

    `file_name` is that of the metadata; `sizes` has the recorded bytes by key, of which at most one more is read from
    a tar or an image; of Parquet, a row group is in memory.
    Raises: StoreError; whatever tarfile and pyarrow raise at a file that is damaged.
    """
    if file_name.endswith(".tar"):
        yield from _from_tar(_opened(store, file_name), sizes)
    elif file_name.endswith(".parquet"):
        yield from _from_parquet(_opened(store, file_name), sizes)
    else:
        for key, size in sizes.items():
            yield key, StoredFileReader(store, file_name).read(size + 1) or b""


def _from_tar(file: io.BufferedReader, sizes: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    """Walk from header to header and stop at the last image that is wanted."""
    left = set(sizes)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            key, _, suffix = member.name.rpartition(".")
            if key in left and suffix not in ("txt", "json") and (content := tar.extractfile(member)):
                left.remove(key)
                yield key, content.read(sizes[key] + 1)
            if not left:
                return


def _from_parquet(file: io.BufferedReader, sizes: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    """Read the keys, then the images of each row group that has some of them: they lie in one page."""
    with pq.ParquetFile(file, buffer_size=BLOCK, pre_buffer=False) as table:
        for group in range(table.num_row_groups):
            keys = table.read_row_group(group, columns=["key"])["key"].to_pylist()
            wanted = [number for number, key in enumerate(keys) if key in sizes]
            if wanted:
                images = table.read_row_group(group, columns=["image.bytes"])["image"]
                for number in wanted:
                    yield keys[number], images[number].as_py()["bytes"]


def _opened(store: Store, key: str) -> io.BufferedReader:
    return io.BufferedReader(StoredFileReader(store, key), BLOCK)


class StoredFileReader(io.RawIOBase):
    """An object as a file to read and seek in; each read is a request of its own, tried again as the store does."""

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key
        self._size = store.size(key)
        self._position = 0

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def tell(self) -> int:
        """Give the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; past the end is allowed, as in other files. Raises: ValueError before the start."""
        position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence] + offset
        if position < 0:
            raise ValueError(f"{self._store.url(self._key)}: cannot seek to {position}")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        """Fill what there is of `buffer`. Returns: the number of bytes; 0 at the end."""
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = self._store.read_range(self._key, self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
