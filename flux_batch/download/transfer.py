"""Downloads of remote files: in parallel ranges, continued after a kill, checked by hash.

A file is written from its start, so a killed process leaves a prefix, and the next one continues there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import fsspec

from flux_batch.errors import DiskFull, StoreError, bytes_text
from flux_batch.storage.errors import translated
from flux_batch.storage.retry import with_retries
from flux_batch.telemetry import LOADING

if TYPE_CHECKING:
    from tqdm import tqdm

# Eight ranges of 32 MiB at once: one stream from S3 has about 100 MB/s, 256 MiB of memory are little beside a model,
# and the thousand requests for a model are fewer than hubs allow in a minute.
CHUNK_BYTES = 32 << 20
NUM_STREAMS = 8
# Bytes to leave free on the disk for other programs.
SPARE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A remote file: `name` is relative to the folder of the listing, `path` is its name on the file system.

    `version` changes whenever the bytes do; `sha256` and `git_sha1` (git's name of a blob) come from the remote. Each
    is "", and `size` is None, if the remote does not report it.
    """

    name: str
    path: str
    size: int | None = None
    version: str = ""
    sha256: str = ""
    git_sha1: str = ""

    @property
    def content(self) -> str:
        """The remote's identifier of the bytes, which differs if they do."""
        return self.sha256 or self.git_sha1 or self.version


@dataclass(frozen=True)
class Listing:
    """The remote files of a folder. `uri`: for messages; `fs`: reads them; `commit`: of a repository."""

    uri: str
    fs: fsspec.AbstractFileSystem
    files: tuple[RemoteFile, ...]
    commit: str = ""

    @property
    def fingerprint(self) -> str:
        """A short name for all bytes of the listing, which differs if they do."""
        facts = [(file.name, file.size, file.content) for file in self.files]
        return hashlib.sha256(repr(sorted(facts)).encode()).hexdigest()[:16]


class _Digests:
    """The hashes of a file, computed while it is read: sha256, and git's if the remote reports that."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        # Git hashes the size of a blob before its bytes.
        has_git = file.git_sha1 and file.size is not None
        self._git = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False) if has_git else None

    def update(self, data: bytes) -> None:
        """Add the next bytes."""
        self._sha256.update(data)
        if self._git:
            self._git.update(data)

    @property
    def sha256(self) -> str:
        """The sha256 of the bytes so far."""
        return self._sha256.hexdigest()

    @property
    def is_match(self) -> bool:
        """True if the hashes equal those that the remote reports, if any."""
        is_git_match = self._git is None or self._git.hexdigest() == self._file.git_sha1
        return is_git_match and self._file.sha256 in ("", self.sha256)


def download_files(
    listing: Listing, folder: Path, name_in_folder: Callable[[RemoteFile], str] = attrgetter("name")
) -> dict[str, str]:
    """Download all files of a listing into `folder`, and continue partial ones. Shows a progress bar.

    `folder` must hold nothing but prefixes of the same files. Returns: sha256 by name.
    Raises: DiskFull if the disk is too small, StoreError for a file that arrives damaged or not at all.
    """
    from tqdm import tqdm

    paths = {file.name: folder / name_in_folder(file) for file in listing.files}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(file.size or 0 for file in listing.files)
    there = sum(path.stat().st_size for path in paths.values() if path.is_file())
    check_room(folder, num_bytes - there, listing.uri)
    pool = ThreadPoolExecutor(NUM_STREAMS, thread_name_prefix="fetch")
    bar = tqdm(total=num_bytes, unit="B", unit_scale=True, desc=listing.uri, disable=None)
    try:
        return {file.name: _download_file(listing, file, paths[file.name], pool, bar) for file in listing.files}
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)


def _download_file(listing: Listing, file: RemoteFile, path: Path, pool: ThreadPoolExecutor, bar: tqdm[Any]) -> str:
    """Download one file to `path`, or the rest of it. Returns: its sha256."""
    digests = _Digests(file)
    if path.exists() and (file.size is None or path.stat().st_size > file.size):
        path.unlink()
    with translated(str(path), "write"), path.open("a+b") as target:
        target.seek(0)
        for chunk in _read_pieces(target):
            digests.update(chunk)
            bar.update(len(chunk))
            LOADING.beat()
        for chunk in _remainder(listing, file, target.tell(), pool):
            target.write(chunk)
            digests.update(chunk)
            bar.update(len(chunk))
            LOADING.beat()
        target.flush()
        os.fsync(target.fileno())
        num_bytes = target.tell()
    if file.size not in (None, num_bytes) or not digests.is_match:
        path.unlink()
        raise StoreError(
            f"{listing.uri}: {file.name} arrived damaged: {num_bytes} bytes with sha256 {digests.sha256}, should be "
            f"{file.size} with {file.sha256 or file.git_sha1 or 'any'}; run the same command again"
        )
    return digests.sha256


def sha256_if_same(path: Path, file: RemoteFile) -> str:
    """Return the sha256 of a local file that equals the remote one, else "".

    Size and hash are compared. Reads the whole file if the sizes agree and the remote has a hash.
    """
    if not (file.sha256 or file.git_sha1) or not path.is_file() or path.stat().st_size != file.size:
        return ""
    digests = _Digests(file)
    with path.open("rb") as source:
        for chunk in _read_pieces(source):
            digests.update(chunk)
    return digests.sha256 if digests.is_match else ""


def check_room(folder: Path, num_bytes: int, uri: str, *, variable: str = "FLUX_BATCH_CACHE") -> None:
    """Raise DiskFull unless the disk of `folder` has room for that many bytes more."""
    free = shutil.disk_usage(folder).free
    if num_bytes > 0 and num_bytes + SPARE_BYTES > free:
        raise DiskFull(
            f"{folder}: {uri} needs {bytes_text(num_bytes)} more and {bytes_text(SPARE_BYTES)} to spare; "
            f"{bytes_text(free)} are free on this disk; "
            f"make room, or choose a folder on a larger one ({variable} sets that of the cache)"
        )


def _remainder(listing: Listing, file: RemoteFile, start: int, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """Yield the bytes of a remote file from `start`; as one stream if its server supports no ranges."""
    position = start
    if file.size is not None:
        try:
            for chunk in _ranges(listing, file, start, pool):
                yield chunk
                position += len(chunk)
        except ValueError as error:
            if "range requests" not in str(error):  # fsspec has no class for it
                raise
        else:
            return
    yield from _stream(listing, file, position)


def _ranges(listing: Listing, file: RemoteFile, start: int, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """Yield the ranges of a file in order, while the next ones are fetched."""
    assert file.size is not None
    coming: deque[Future[bytes]] = deque()
    try:
        for begin in range(start, file.size, CHUNK_BYTES):
            coming.append(pool.submit(_read_range, listing, file, begin, min(begin + CHUNK_BYTES, file.size)))
            if len(coming) == NUM_STREAMS:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        for future in coming:
            future.cancel()


def _read_range(listing: Listing, file: RemoteFile, start: int, end: int) -> bytes:
    """Read all bytes from `start` to `end` of a remote file."""

    def read() -> bytes:
        if "http" in listing.fs.protocol:
            # Not cat_file: it reads everything that a server without ranges sends, possibly the whole file.
            with listing.fs.open(file.path, block_size=end - start, cache_type="none", size=file.size) as source:
                source.seek(start)
                data = bytes(source.read(end - start))
        else:
            data = bytes(listing.fs.cat_file(file.path, start=start, end=end))
        if len(data) != end - start:
            raise OSError(f"{len(data)} bytes came instead of {end - start}")
        return data

    return with_retries(f"{listing.uri}: {file.name}", "read", read)


def _stream(listing: Listing, file: RemoteFile, skip: int) -> Iterator[bytes]:
    """Yield a remote file without its first `skip` bytes, as one stream."""
    with (
        translated(f"{listing.uri}: {file.name}", "read"),
        listing.fs.open(file.path, "rb", block_size=0) as source,
    ):
        for chunk in _read_pieces(source):
            yield chunk[skip:]
            skip = max(0, skip - len(chunk))


def _read_pieces(source: IO[bytes]) -> Iterator[bytes]:
    """Yield the rest of an open file in pieces that are quick to hash."""
    while chunk := source.read(1 << 20):
        yield chunk
