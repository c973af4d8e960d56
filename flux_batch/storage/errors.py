"""What the errors of file systems mean: which may pass by themselves, which are a no, which say that a disk is full.

The only place that translates them. Knows file systems and HTTP statuses; performs no operation.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flux_batch.errors import AlreadyExists, DiskFull, FluxBatchError, NotFound, StoreError, StoreRefused, one_line

# Client libraries whose exceptions are no OSError; told by module, so that none has to be imported.
CLIENTS = {"adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "s3fs"}
REFUSALS = (PermissionError, IsADirectoryError, NotADirectoryError)
# A disk that answers so will do it again.
REFUSAL_ERRNOS = {errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP}
FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
# HTTP: what passes, of the statuses below 500 that otherwise mean no; and what does not, of those above.
PASSING_STATUSES = {408, 409, 412, 425, 429}
LASTING_STATUSES = {501, 505}
FULL_STATUSES = {507}
# S3: a body that was cut or changed on its way, and a server that waited in vain for the rest, are a 400 as well.
PASSING_CODES = {"BadDigest", "IncompleteBody", "RequestTimeout", "SlowDown", "XAmzContentSHA256Mismatch"}
FULL_CODES = {"QuotaExceeded", "XMinioStorageFull"}  # Ceph's, MinIO's


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
        if is_full(error):
            raise DiskFull(f"{uri}: cannot {operation}: there is no room left ({one_line(error)})") from error
        if is_refusal(error):
            raise StoreRefused(
                f"{uri}: cannot {operation}: {one_line(error)}; check path, credentials, permissions"
            ) from error
        if isinstance(error, OSError) or _is_of_client(error):
            raise StoreError(f"{uri}: cannot {operation}: {one_line(error)}") from error
        raise


def is_transient(error: BaseException) -> bool:
    """Whether another try may help: neither an answer about the key nor a refusal nor a full disk."""
    if isinstance(error, (FileExistsError, FileNotFoundError, FluxBatchError)):
        return False
    if is_full(error) or is_refusal(error) or status(error) in LASTING_STATUSES:
        return False
    return isinstance(error, OSError) or _is_of_client(error)


def is_refusal(error: BaseException) -> bool:
    """Whether the storage answered and said no, and will again."""
    if isinstance(error, REFUSALS) or "Credentials" in type(error).__name__:
        return True
    answer = status(error)
    if answer is not None:
        return answer < 500 and answer not in PASSING_STATUSES and code(error) not in PASSING_CODES
    return isinstance(error, OSError) and error.errno in REFUSAL_ERRNOS


def is_full(error: BaseException) -> bool:
    """Whether a disk, or the share of it that one may use, is full."""
    if isinstance(error, OSError) and error.errno in FULL_ERRNOS:
        return True
    return status(error) in FULL_STATUSES or code(error) in FULL_CODES


def status(error: BaseException) -> int | None:
    """Find the HTTP status behind an error; None if it was no answer of a server."""
    for link in _chain(error):
        answer = _answer(link).get("ResponseMetadata", {}).get("HTTPStatusCode", getattr(link, "status", None))
        answer = answer or getattr(link, "status_code", None)
        if isinstance(answer, int) and answer >= 300:
            return answer
    return None


def code(error: BaseException) -> str:
    """Find the code of S3 behind an error; empty if there is none."""
    return next((str(found) for link in _chain(error) if (found := _answer(link).get("Error", {}).get("Code"))), "")


def _answer(error: BaseException) -> dict[str, Any]:
    """Give the answer that botocore keeps in its errors."""
    answer = getattr(error, "response", None)
    return answer if isinstance(answer, dict) else {}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it came from; s3fs hides the answer of a server behind an OSError."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__


def _is_of_client(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in CLIENTS
