"""A folder on a disk or in a bucket: reads, atomic writes, put-if-absent, one retry policy.

Knows bytes and keys; does not know what they mean. The only place that translates storage errors.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from flux_batch.errors import AlreadyExists, FluxBatchError, NotFound, StoreError, StoreRefused
from flux_batch.storage.run_files import SCRATCH

ATTEMPTS = 5
REFUSALS = (PermissionError, IsADirectoryError, NotADirectoryError)
# What file systems without hard links answer: FUSE mounts of buckets, FAT.
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
# HTTP: no or wrong credentials, no permission.
REFUSAL_STATUSES = {401, 403}
REFUSAL_CODES = {errno.EROFS, errno.ENAMETOOLONG}
FINAL_CODES = REFUSAL_CODES | {errno.ENOSPC, errno.EDQUOT}
# Some servers send the checksum of a whole object with a part of it; botocore would compare the two.
S3_CLIENT = {"response_checksum_validation": "when_required"}

T = TypeVar("T")


def open_filesystem(uri: str, storage_options: Mapping[str, Any]) -> tuple[fsspec.AbstractFileSystem, str]:
    """Open the file system of a URI; listings are never cached, since other machines write too.

    Returns: the file system and the path of `uri` in it.
    Raises: StoreRefused for a protocol that is not installed or options that do not fit.
    """
    options = {**storage_options, "use_listings_cache": False}
    try:
        if uri.startswith(("s3://", "s3a://")):
            options["config_kwargs"] = {**S3_CLIENT, **options.get("config_kwargs", {})}
        if uri.startswith(("http://", "https://")):
            options["client_kwargs"] = {**_http_client(), **options.get("client_kwargs", {})}
        fs, path = fsspec.url_to_fs(uri, **options)
        if hasattr(fs, "connect"):
            fs.connect()  # s3fs would meet options that do not fit only at its first request
    except (ImportError, ValueError, TypeError) as error:
        raise StoreRefused(f"{uri}: cannot be opened: {_reason(error)}; check the URI and storage_options") from error
    return fs, path


@contextmanager
def translated(uri: str, operation: str) -> Iterator[None]:
    """Turn what file systems raise into the StoreErrors of this package, with the URI and the operation in it."""
    try:
        yield
    except FluxBatchError:
        raise
    except FileExistsError as error:
        raise AlreadyExists(f"{uri}: already exists") from error
    except FileNotFoundError as error:
        raise NotFound(f"{uri}: not found (cannot {operation})") from error
    except Exception as error:
        if _is_refusal(error):
            raise StoreRefused(
                f"{uri}: cannot {operation}: {_reason(error)}; check path, credentials, permissions"
            ) from error
        if isinstance(error, OSError) or _is_client_error(error):
            raise StoreError(f"{uri}: cannot {operation}: {_reason(error)}") from error
        raise


def attempt(uri: str, operation: str, function: Callable[[], T]) -> T:
    """Run one storage operation under the retry policy of the package; its errors are StoreErrors."""
    retrying = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.2, max=10),
        retry=retry_if_exception(_is_transient),
        reraise=True,
    )
    with translated(uri, operation):
        return retrying(function)


class Store:
    """The folder of one run."""

    def __init__(self, uri: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.uri = uri.rstrip("/") or uri
        self._fs, path = open_filesystem(self.uri, storage_options or {})
        self._root = path.rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)

    def url(self, key: str) -> str:
        """Name a key as the user would write it."""
        return f"{self.uri}/{key}"

    def read(self, key: str) -> bytes:
        """Read a whole object. Raises: NotFound."""
        return self._call(key, "read", lambda: bytes(self._fs.cat_file(self._path(key))))

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Read the bytes [start, end) of an object, fewer if it is shorter. Raises: NotFound."""
        return self._call(key, "read", lambda: bytes(self._fs.cat_file(self._path(key), start=start, end=end)))

    def size(self, key: str) -> int:
        """Tell how many bytes an object has. Raises: NotFound."""
        return self._call(key, "look up", lambda: int(self._fs.info(self._path(key))["size"]))

    def download(self, key: str, path: Path) -> None:
        """Copy an object to the local disk. Raises: NotFound."""
        self._call(key, "read", lambda: self._fs.get_file(self._path(key), str(path)))

    def exists(self, key: str) -> bool:
        """Tell whether an object is there."""

        def is_file() -> bool:
            try:
                # Not fs.isfile: that answers False to whatever goes wrong.
                return bool(self._fs.info(self._path(key))["type"] == "file")
            except FileNotFoundError:
                return False

        return self._call(key, "look up", is_file)

    def list(self, prefix: str) -> list[str]:
        """List the keys under a folder, sorted; an absent folder is empty."""

        def find() -> list[str]:
            try:
                return self._fs.find(self._path(prefix))  # type: ignore[no-any-return]
            except FileNotFoundError:
                return []

        start = len(self._root) + 1
        return sorted(str(path)[start:] for path in self._call(prefix, "list", find))

    def write(self, key: str, data: bytes | Path) -> None:
        """Write an object, replacing one that is there; a reader sees the old or the new one, never a half."""
        if self._is_local:
            self._call(key, "write", lambda: self._write_local(key, data, os.replace))
        else:
            self._call(key, "write", lambda: self._send(key, data, mode="overwrite"))

    def put_if_absent(self, key: str, data: bytes | Path) -> None:
        """Create an object unless there is one. Raises: AlreadyExists.

        Atomic on a local disk and on stores that honour conditional writes. On others it is a look-up and a write:
        of two writers in the same instant the later one stays, and neither is told.
        A lost answer to a write that did succeed also ends in AlreadyExists: the caller compares the contents.
        """
        if self._is_local:
            self._call(key, "create", lambda: self._write_local(key, data, _create))
        elif self.has_conditional_put:
            self._call(key, "create", lambda: self._send(key, data, mode="create"))
        elif self.exists(key):
            raise AlreadyExists(f"{self.url(key)}: already exists")
        else:
            self.write(key, data)

    def delete(self, key: str) -> None:
        """Remove an object. Safe to call twice."""
        with suppress(NotFound):
            self._call(key, "delete", lambda: self._fs.rm_file(self._path(key)))

    @cached_property
    def has_conditional_put(self) -> bool:
        """Whether the store refuses a conditional write to a taken key; found by trying, since some accept it silently.

        Writes and deletes one small object.
        """
        if self._is_local:
            return True
        key = f"{SCRATCH}/{uuid.uuid4().hex}"
        self._call(key, "write", lambda: self._send(key, b"first", mode="overwrite"))
        try:
            self._call(key, "create", lambda: self._send(key, b"second", mode="create"))
        except AlreadyExists:
            return True
        except StoreError:
            return False  # some stores answer 501 to the header they do not know
        finally:
            self.delete(key)
        return False

    def check_writable(self) -> None:
        """Write and delete one small object. Raises: StoreRefused or StoreError before any work is spent."""
        key = f"{SCRATCH}/{uuid.uuid4().hex}"
        self.write(key, b"")
        self.delete(key)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _send(self, key: str, data: bytes | Path, *, mode: str) -> None:
        try:
            if isinstance(data, Path):
                self._fs.put_file(str(data), self._path(key), mode=mode)
            else:
                self._fs.pipe_file(self._path(key), data, mode=mode)
        except FileNotFoundError as error:  # a write cannot miss its own key: it is the bucket that is not there
            raise StoreRefused(f"{self.url(key)}: cannot write: no such bucket or folder") from error

    def _write_local(self, key: str, data: bytes | Path, publish: Callable[[str, str], None]) -> None:
        """Write beside and publish in one step: os.replace takes the name over, a link refuses a taken one."""
        target = Path(self._path(key))
        scratch = Path(self._path(SCRATCH)) / uuid.uuid4().hex
        try:
            scratch.parent.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # folders that cannot be made, as under /proc
            raise StoreRefused(f"{self.url(key)}: cannot write: no folder can be made there") from error
        try:
            with scratch.open("wb") as file:
                if isinstance(data, Path):
                    with data.open("rb") as source:
                        while chunk := source.read(1 << 20):
                            file.write(chunk)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            publish(str(scratch), str(target))
        finally:
            scratch.unlink(missing_ok=True)

    def _call(self, key: str, operation: str, function: Callable[[], T]) -> T:
        return attempt(self.url(key), operation, function)


def _http_client() -> dict[str, Any]:
    """Return how HTTP is spoken: by the proxies of the environment, and with patience while bytes come."""
    from aiohttp import ClientTimeout

    return {"trust_env": True, "timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}


def _create(scratch: str, target: str) -> None:
    """Publish a file under a name that must be free: a hard link; where there are none, a look-up and a rename."""
    try:
        os.link(scratch, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.exists(target):
            raise FileExistsError(target) from error
        os.replace(scratch, target)


def _is_client_error(error: BaseException) -> bool:
    """Whether a client library raised it; told by module, so that none has to be imported."""
    return type(error).__module__.split(".")[0] in {"botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec"}


def _is_refusal(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in REFUSAL_CODES:
        return True
    if getattr(error, "status", None) in REFUSAL_STATUSES:  # aiohttp's
        return True
    return isinstance(error, REFUSALS) or "Credentials" in type(error).__name__


def _is_transient(error: BaseException) -> bool:
    """Whether another try may help: neither an answer about the key nor a refusal nor a full disk."""
    if isinstance(error, (FileExistsError, FileNotFoundError, FluxBatchError)) or _is_refusal(error):
        return False
    if isinstance(error, OSError):
        return error.errno not in FINAL_CODES
    return _is_client_error(error)


def _reason(error: BaseException) -> str:
    text = re.sub(r"(://[^\s'\"?]+)\?[^\s'\"]*", r"\1", str(error))  # what follows may be a signature
    return " ".join(text.split()) or type(error).__name__
