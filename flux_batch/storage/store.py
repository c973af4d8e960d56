"""A folder on a disk or in a bucket: reads, atomic writes, put-if-absent, each with retries.

This module knows bytes and keys, not their meaning.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from functools import cached_property, partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from flux_batch.errors import AlreadyExists, DiskFull, NotFound, StoreError, StoreRefused, one_line
from flux_batch.storage import s3
from flux_batch.storage.contact import FIRST_ATTEMPTS, Contact
from flux_batch.storage.disk import create, make_folder
from flux_batch.storage.entries import Entry, listed_entries, local_entries, local_files
from flux_batch.storage.errors import FULL_ERRNOS, NO_BUCKET, code, is_transient, origin, said, status, translated
from flux_batch.storage.filesystem import open_filesystem
from flux_batch.storage.multipart import Upload, abort, list_uploads, put_in_parts, put_whole
from flux_batch.storage.retry import RetryPolicy

log = logging.getLogger(__name__)

# The folder of half-written files. Those of a killed process stay here, where no loader of the data set looks.
STORE_TMP = "_run/tmp"
# The folder in it for the flags of writers that wait for their turn; see turns.py.
_TURNS = f"{STORE_TMP}/turns"
_ADVICE = "check it and storage_options; if it is right, run the same command again when it is back"

# The operations that change something.
WRITES = {"write", "create", "delete"}
# The smallest number of bytes that one ranged read requests.
BLOCK_BYTES = 64 << 10
# From this size on, an object goes in parts to a store that ignores conditions, with the look-up after the last part.
LOOK_LATE_BYTES = 5 << 20
# Threads that remove objects, and objects that are handed to them at once.
_DELETERS = 16
_KEYS_AT_ONCE = 1000

T = TypeVar("T")


class Store:
    """A folder of objects, by keys relative to it; its policy says how transient errors are retried."""

    def __init__(
        self, uri: str, storage_options: Mapping[str, Any] | None = None, policy: RetryPolicy | None = None
    ) -> None:
        self.uri = uri.rstrip("/") or uri
        with translated(self.uri, "connect"):
            self._fs, path = open_filesystem(self.uri, storage_options or {}, num_retries=0)
        if s3.is_s3(self._fs):
            self._fs.retries = 1  # one attempt by s3fs: the policy retries
        self._root = path.rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._contact = Contact()
        self._policy = policy or RetryPolicy()
        self._before_write: Callable[[], None] | None = None

    @property
    def is_local(self) -> bool:
        """True for a folder on a local or mounted disk."""
        return self._is_local

    def with_policy(self, policy: RetryPolicy) -> Self:
        """Return a store of the same folder with another retry policy."""
        other = copy(self)
        other._policy = policy
        return other

    def guarded(self, before_write: Callable[[], None]) -> Self:
        """Return a store of the same folder that calls `before_write` before each write.

        It is called before each retry of a write too; an exception of it ends the write.
        """
        other = copy(self)
        other._before_write = before_write
        return other

    def ended_by(self, on_wait: Callable[[], None], on_request: Callable[[float], None]) -> Self:
        """Return a store of the same folder with two more checks; see RetryPolicy.ended_by."""
        return self.with_policy(self._policy.ended_by(on_wait, on_request))

    def url(self, key: str) -> str:
        """Return the full address of a key."""
        return f"{self.uri}/{key}"

    def read(self, key: str) -> bytes:
        """Read a whole object. Raises: NotFound."""
        if s3.is_s3(self._fs):
            return self._call(key, "read", lambda: self._await(s3.read_whole(self._fs, self._path(key))))
        return self._call(key, "read", lambda: bytes(self._ask("cat_file", self._path(key))))

    def find(self, key: str) -> bytes | None:
        """Read a whole object; None if it is not there."""
        with suppress(NotFound):
            return self.read(key)
        return None

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Read the bytes [start, end) of an object, fewer if it is shorter. Raises: NotFound."""
        return self._call(key, "read", lambda: bytes(self._ask("cat_file", self._path(key), start=start, end=end)))

    def open(self, key: str) -> AbstractBufferedFile:
        """Return an object as a file to read and seek in, each request with retries. Raises: NotFound."""
        return _StoredFile(self, self._fs, self._path(key), key)

    def size(self, key: str) -> int:
        """Return the size of an object in bytes. Raises: NotFound."""
        return self._call(key, "look up", lambda: int(self._ask("info", self._path(key))["size"]))

    def download(self, key: str, path: Path) -> None:
        """Copy an object to the local disk. Raises: NotFound, DiskFull if there is no room for it."""

        def get() -> None:
            try:
                self._ask("get_file", self._path(key), str(path))
            except OSError as error:
                if error.errno not in FULL_ERRNOS:
                    raise
                raise DiskFull(f"{path.parent}: no room for a copy of {self.url(key)}; free some") from error

        self._call(key, "read", get)

    def local_file(self, key: str, folder: Path) -> Path:
        """Return a local path of an object: its own on a disk, else that of a copy in `folder`. Raises: NotFound."""
        if self._is_local:
            if not self.exists(key):
                raise NotFound(f"{self.url(key)}: not found")
            return Path(self._path(key))
        path = folder / key.replace("/", "-")
        self.download(key, path)
        return path

    def exists(self, key: str) -> bool:
        """Return whether an object exists."""
        return self._call(key, "look up", lambda: self._is_file(key))

    def list(self, prefix: str) -> list[str]:
        """Return the sorted keys under a folder; none if the folder does not exist."""

        def find() -> Sequence[str]:
            if s3.is_s3(self._fs):
                return self._await(s3.list_folder(self._fs, self._path(prefix)))
            return [*local_files(folder)] if self._is_local else self._ask("find", folder)

        folder, start = self._path(prefix).rstrip("/"), len(self._root) + 1
        paths = map(str, self._listed(prefix, find, tuple))
        # s3fs lists the folder itself if its first object is written during the listing.
        return sorted(path[start:] for path in paths if path.startswith(f"{folder}/"))

    def is_link(self, key: str) -> bool:
        """Return whether a name on a disk is a link."""
        return self._is_local and os.path.islink(self._path(key))

    def scan(self, folder: str, take: Callable[[Iterable[Entry]], T], *, after: str = "", with_sizes: bool = True) -> T:
        """Return the result of `take` for the entries directly in a folder, in any order.

        Entries up to `after` are left out, and S3 does not list them. A missing folder has no entries. After a
        transient error `take` is called again with all entries. with_sizes: False is faster, but sizes may be 0.
        """
        entries = partial(self._entries, folder, after, with_sizes)
        return self._listed(folder, lambda: take(entries()), lambda: take(()))

    def children(self, folder: str) -> dict[str, int | None]:
        """Return the names directly in a folder: the size of each object in bytes, None for a folder in it."""
        return self.scan(folder, dict)

    def any_key(self, folder: str) -> str | None:
        """Return one of the keys under a folder, None if there is none. Stops listing at the first key."""

        def take(entries: Iterable[Entry]) -> str | None:
            keys = ((f"{folder}/{name}", size) for name, size in entries)
            return next(filter(None, (self.any_key(key) if size is None else key for key, size in keys)), None)

        return self.scan(folder, take, with_sizes=False)

    def _entries(self, folder: str, after: str, with_sizes: bool) -> Iterable[Entry]:
        path = self._path(folder).rstrip("/")
        if s3.is_s3(self._fs):
            found = s3.entries_of(self._fs, path, after, self._await)
        elif self._is_local:
            found = local_entries(path, with_sizes=with_sizes)
        else:
            found = listed_entries(path, self._ask("ls", path, detail=True))
        return filter(lambda entry: entry[0] > after, found) if after else found

    def write(self, key: str, data: bytes | Path) -> None:
        """Write or replace an object; a reader sees the old or the new content, never a part of it."""
        if self._is_local:
            self._call(key, "write", lambda: self._write_local(key, data, os.replace))
        else:
            self._call(key, "write", lambda: self._send(key, data, mode="overwrite"))

    def put_if_absent(self, key: str, data: bytes | Path) -> None:
        """Create an object unless the key is taken. Raises: AlreadyExists.

        This is atomic on a local disk, and for objects of up to 5 GiB on stores that honour conditional writes.
        Otherwise it is a look-up and then one request. From LOOK_LATE_BYTES on, writers take turns at these two. If two
        writers create a smaller object at the same instant, the later one overwrites the other without an error.
        If the answer to a successful write is lost, the retry also raises AlreadyExists: the caller compares contents.
        """
        if self._is_local:
            self._call(key, "create", lambda: self._write_local(key, data, create))
        elif self.has_conditional_put:
            self._call(key, "create", lambda: self._create_remote(key, data))
        else:
            self._call(key, "create", lambda: self._look_and_create(key, data))

    def delete(self, key: str) -> None:
        """Remove an object. Safe to call twice."""
        with suppress(NotFound):
            self._call(key, "delete", lambda: self._ask("rm_file", self._path(key)))

    def delete_many(self, keys: Sequence[str]) -> None:
        """Remove objects, several at a time; on S3 with one request for each 1,000 of them. Safe to call twice."""
        with ThreadPoolExecutor(_DELETERS, "delete") as pool:
            if s3.is_s3(self._fs):
                keys = [key for left in pool.map(self._delete_at_once, _parts(keys, s3.MAX_DELETES)) for key in left]
            for part in _parts(keys, _KEYS_AT_ONCE):
                list(pool.map(self.delete, part))

    def _delete_at_once(self, keys: Sequence[str]) -> Sequence[str]:
        """Remove objects of S3 in one request. Returns: the keys that it did not remove."""
        if len(keys) == 1 or not self._contact.deletes_many:
            return keys
        paths = [self._path(key) for key in keys]
        left = self._call(keys[0], "delete", lambda: self._await(s3.delete_many(self._fs, paths)))
        self._contact.deletes_many = len(left) < len(keys)  # some stores do not support the request
        return [path.removeprefix(f"{self._root}/") for path in left]

    def delete_folder(self, prefix: str) -> None:
        """Remove every object under a folder and, on a disk, the folder itself. Safe to call twice."""
        self.delete_many(self.list(prefix))
        if self._is_local:
            for folder, _, _ in os.walk(self._path(prefix), topdown=False):
                with suppress(OSError):  # another process has put a file there meanwhile
                    os.rmdir(folder)

    def unfinished_uploads(self) -> Sequence[Upload]:
        """Return the unfinished multipart uploads; none if the store cannot list them."""
        if not s3.is_s3(self._fs):
            return ()
        none: Sequence[Upload] = ()
        return self._told("", lambda: self._await(list_uploads(self._fs, self._root)), none)

    def abort(self, upload: Upload) -> None:
        """Abort an unfinished upload and remove its parts. Safe to call twice."""
        self._call(self.key_of(upload), "delete", lambda: self._await(abort(self._fs, upload)))

    def key_of(self, upload: Upload) -> str:
        """Return the key of the object that an upload would have become."""
        return upload.path.removeprefix(f"{self._root}/")

    @cached_property
    def keeps_versions(self) -> bool:
        """True if deleted and replaced objects remain as old versions; False if the store does not tell."""
        if not s3.is_s3(self._fs):
            return False
        return self._told("", lambda: self._await(s3.keeps_versions(self._fs, self._root)), False)

    @cached_property
    def has_conditional_put(self) -> bool:
        """True if the store refuses a conditional write to a taken key.

        This is tried with one small object, which is then deleted: some stores ignore the condition silently.
        """
        if self._is_local:
            return True
        key = f"{STORE_TMP}/{uuid.uuid4().hex}"
        self._call(key, "write", lambda: self._send(key, b"first", mode="overwrite"))
        try:
            self._call(key, "create", lambda: self._send(key, b"second", mode="create"))
        except AlreadyExists:
            return True
        except StoreError as error:
            if status(error) != HTTPStatus.NOT_IMPLEMENTED:  # some stores answer this to a header they do not know
                raise
        finally:
            self.delete(key)
        return False

    def check_writable(self) -> None:
        """Write and delete one small object, to fail before any work is done. Raises: StoreRefused, StoreError."""
        key = f"{STORE_TMP}/{uuid.uuid4().hex}"
        self.write(key, b"")
        self.delete(key)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _is_file(self, key: str) -> bool:
        try:
            # Not fs.isfile, which returns False after any error.
            return bool(self._ask("info", self._path(key))["type"] == "file")
        except FileNotFoundError as error:
            if code(error) == NO_BUCKET:
                raise
            return False

    def _look_and_create(self, key: str, data: bytes | Path) -> None:
        """Create an object on a store without conditional writes; see put_if_absent."""
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        if s3.is_s3(self._fs) and size >= LOOK_LATE_BYTES:
            self._send(key, data, mode="create in parts")
        elif self._await(s3.is_there(self._fs, self._path(key))) if s3.is_s3(self._fs) else self._is_file(key):
            raise FileExistsError(key)
        else:
            self._send(key, data, mode="overwrite")

    def _listed(self, folder: str, find: Callable[[], T], none: Callable[[], T]) -> T:
        """Run a listing of a folder; a missing folder gives `none()`, a missing bucket is an error."""

        def found() -> T:
            try:
                return find()
            except FileNotFoundError as error:
                if code(error) == NO_BUCKET:
                    raise
                return none()

        return self._call(folder, "list", found)

    def _create_remote(self, key: str, data: bytes | Path) -> None:
        """Create an object by a conditional write; retry a refusal if the key is free by now."""
        try:
            self._send(key, data, mode="create")
        except FileExistsError:
            if self._is_file(key):
                raise
            raise ConnectionError("the store refused the key as taken, but it is free") from None

    def _send(self, key: str, data: bytes | Path, *, mode: str) -> None:
        path = self._path(key)
        try:
            if mode == "create in parts":
                self._await(put_in_parts(self._fs, path, data, self._path(_TURNS), is_conditional=False))
            elif mode == "create" and s3.is_s3(self._fs):
                self._await(put_whole(self._fs, path, data, self._path(_TURNS)))
            elif isinstance(data, Path):
                self._ask("put_file", str(data), path, mode=mode)
            else:
                self._ask("pipe_file", path, data, mode=mode)
        except FileNotFoundError as error:
            if code(error) == "NoSuchUpload":  # the upload was aborted, or completed with its answer lost: retry
                raise ConnectionError(one_line(error)) from None
            # A write cannot miss its own key: the bucket is missing.
            raise StoreRefused(f"{self.url(key)}: cannot write: no such bucket or folder") from error
        except OSError as error:
            # s3fs recognises only the wording of AWS.
            if mode != "overwrite" and status(error) == HTTPStatus.PRECONDITION_FAILED:
                raise FileExistsError(key) from error
            raise

    def _write_local(self, key: str, data: bytes | Path, publish: Callable[[str, str], None]) -> None:
        """Write a temporary file and publish it in one step; `publish` replaces or refuses a taken name."""
        target = Path(self._path(key))
        temporary = Path(self._path(STORE_TMP)) / uuid.uuid4().hex
        try:
            make_folder(temporary.parent)
            make_folder(target.parent)
        except FileNotFoundError as error:  # no folder can be made there, for example under /proc
            raise StoreRefused(f"{self.url(key)}: cannot write: no folder can be made there") from error
        try:
            with temporary.open("wb") as file:
                if isinstance(data, Path):
                    with data.open("rb") as source:
                        while chunk := source.read(1 << 20):
                            file.write(chunk)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                publish(str(temporary), str(target))
            except FileNotFoundError as error:
                # The end of a run and the clearing of staged images remove temporary files and empty folders, as if
                # their process were dead. This process lives, so it writes again.
                raise ConnectionError("the file was removed before it was renamed") from error
        finally:
            temporary.unlink(missing_ok=True)

    def _ask(self, operation: str, *arguments: Any, **options: Any) -> Any:
        """Run an operation of the file system, and wait for it by the policy."""
        if not isinstance(self._fs, AsyncFileSystem):
            return getattr(self._fs, operation)(*arguments, **options)
        return self._await(getattr(self._fs, f"_{operation}")(*arguments, **options))

    def _await(self, request: Coroutine[Any, Any, T]) -> T:
        policy = self._policy if self._is_known else self._policy.ended_by(_no_check, self._check_contact)
        return policy.wait_for(asyncio.run_coroutine_threadsafe(request, self._fs.loop))

    @property
    def _is_known(self) -> bool:
        """True if the storage has answered, or the policy waits out an outage anyway."""
        return self._is_local or bool(self._policy.outage_s) or self._contact.is_made

    def _check_contact(self, waited_s: float) -> None:
        self._contact.check(lambda: asyncio.run_coroutine_threadsafe(self._fs._info(self._root), self._fs.loop))

    def _told(self, key: str, function: Callable[[], T], otherwise: T) -> T:
        """Return the result of a request that a store may not support or not permit; then `otherwise`."""
        try:
            return self._call(key, "look up", function)
        except (StoreRefused, NotFound) as error:
            log.debug("%s", error)
        except StoreError as error:
            if status(error) != HTTPStatus.NOT_IMPLEMENTED:
                raise
        return otherwise

    def _call(self, key: str, operation: str, function: Callable[[], T]) -> T:
        before_write = self._before_write if operation in WRITES else None

        def guarded() -> T:
            if before_write:
                before_write()  # at every attempt: after a long outage another driver may have taken over the run
            return function()

        if self._is_known:
            return self._policy.with_retries(self.url(key), operation, guarded)
        return self._call_first(key, operation, guarded)

    def _call_first(self, key: str, operation: str, function: Callable[[], T]) -> T:
        """Run an operation on a store that has not answered yet, with fewer attempts."""
        self._contact.begin()
        try:
            result = self._policy.with_attempts(FIRST_ATTEMPTS).with_retries(self.url(key), operation, function)
        except StoreError as error:
            cause = error.__cause__
            if cause is not None and is_transient(cause) and status(cause) is None:
                raise StoreError(f"{self.uri}: {self._address} does not answer: {said(cause)}; {_ADVICE}") from cause
            self._contact.is_made = True
            raise
        self._contact.is_made = True
        return result

    @property
    def _address(self) -> str:
        client = getattr(self._fs, "_s3", None)
        return f"endpoint_url {origin(client.meta.endpoint_url)}" if client else "the storage"


class _StoredFile(AbstractBufferedFile):  # type: ignore[misc]
    """A stored object as a file that reads blocks of BLOCK_BYTES through its store."""

    def __init__(self, store: Store, fs: fsspec.AbstractFileSystem, path: str, key: str) -> None:
        super().__init__(fs, path, block_size=BLOCK_BYTES, cache_type="readahead", size=store.size(key))
        self._store = store
        self._key = key

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._store.read_range(self._key, start, end)


def _parts(keys: Sequence[str], size: int) -> list[Sequence[str]]:
    return [keys[first : first + size] for first in range(0, len(keys), size)]


def _no_check() -> None:
    """Do nothing: the `on_wait` of a policy that only needs an `on_request`."""
