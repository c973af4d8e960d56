"""Translation of file system errors into StoreErrors, and their kinds: transient, refusal, full disk.

This is the only module that translates them. It knows file systems and HTTP statuses, and performs no operation.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from flux_batch.errors import AlreadyExists, DiskFull, FluxBatchError, NotFound, StoreError, StoreRefused, one_line
from flux_batch.redaction import public_text

FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
# Client libraries whose exceptions are not OSErrors. They are recognised by module name, without importing them.
_CLIENTS = {
    *("adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "s3fs"),
    *("httpx", "httpx2", "httpcore", "httpcore2"),  # of huggingface_hub
}
_REFUSALS = (PermissionError, IsADirectoryError, NotADirectoryError)
# Errors of a disk that a retry does not change.
_REFUSAL_ERRNOS = {errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ELOOP, errno.EFBIG, errno.EXDEV}
# Below status 500, only these are transient: the others are refusals. From 500 on, only these are permanent.
_TRANSIENT_STATUSES = {408, 409, 412, 425, 429}
_LASTING_STATUSES = {501, 505}
_FULL_STATUSES = {507}
# S3 answers 400 for a body that was truncated or corrupted in transit, or that did not arrive in time. It answers 403
# for a request with an old signature: the machine was suspended after signing, or its clock is wrong.
_TRANSIENT_CODES = {"BadDigest", "IncompleteBody", "RequestTimeTooSkewed", "RequestTimeout", "SlowDown"}
_TRANSIENT_CODES |= {"XAmzContentSHA256Mismatch"}
_FULL_CODES = {"QuotaExceeded", "XMinioStorageFull"}  # of Ceph and MinIO
NO_BUCKET = "NoSuchBucket"


@contextmanager
def translated(uri: str, operation: str) -> Iterator[None]:
    """Translate errors of file systems into StoreErrors that name the URI and the operation."""
    try:
        yield
    except FluxBatchError:
        raise
    except FileExistsError as error:
        raise AlreadyExists(f"{uri}: already exists") from error
    except FileNotFoundError as error:
        if code(error) == NO_BUCKET:
            raise StoreRefused(f"{uri}: cannot {operation}: no such bucket") from error
        raise NotFound(f"{uri}: not found (cannot {operation})") from error
    except Exception as error:
        if is_full(error):
            raise DiskFull(f"{uri}: cannot {operation}: there is no room left ({said(error)})") from error
        if is_refusal(error):
            raise StoreRefused(
                f"{uri}: cannot {operation}: {said(error)}; check path, credentials, permissions"
            ) from error
        if isinstance(error, OSError) or _is_of_client(error):
            raise StoreError(f"{uri}: cannot {operation}: {said(error)}") from error
        raise


def is_transient(error: BaseException) -> bool:
    """Return whether another attempt may succeed.

    It will not if a key is taken or missing, the storage refused, or the disk is full.
    """
    if isinstance(error, (FileExistsError, FileNotFoundError, FluxBatchError)):
        return False
    if is_full(error) or is_refusal(error) or status(error) in _LASTING_STATUSES:
        return False
    return isinstance(error, OSError) or _is_of_client(error)


def is_refusal(error: BaseException) -> bool:
    """Return whether the storage refused an operation, and will refuse it again."""
    if code(error) in _TRANSIENT_CODES:
        return False
    if isinstance(error, _REFUSALS) or "Credentials" in type(error).__name__:
        return True
    answer = status(error)
    if answer is not None:
        return answer < 500 and answer not in _TRANSIENT_STATUSES
    return isinstance(error, OSError) and error.errno in _REFUSAL_ERRNOS


def is_full(error: BaseException) -> bool:
    """Return whether a disk is full, or this user's quota is used up."""
    if isinstance(error, OSError) and error.errno in FULL_ERRNOS:
        return True
    return status(error) in _FULL_STATUSES or code(error) in _FULL_CODES


def status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error; None if no server answered."""
    for link in _chain(error):
        answer = _answer(link).get("ResponseMetadata", {}).get("HTTPStatusCode", getattr(link, "status", None))
        answer = answer or getattr(link, "status_code", None)
        if isinstance(answer, int) and answer >= 300:
            return answer
    # An error of huggingface_hub. It counts only unwrapped: an error raised from it says more than its status.
    answer = getattr(getattr(error, "response", None), "status_code", None)
    return answer if isinstance(error, OSError) and isinstance(answer, int) else None


def http_status(error: BaseException | None) -> int | None:
    """Return the HTTP status behind an error of any client, also a wrapped one; None if no server answered."""
    if error is None:
        return None
    for link in _chain(error):
        answer = getattr(getattr(link, "response", None), "status_code", getattr(link, "code", None))
        if isinstance(answer, int):
            return answer
    return status(error)


def code(error: BaseException) -> str:
    """Return the S3 error code behind an error; empty if there is none."""
    return next((str(found) for link in _chain(error) if (found := _answer(link).get("Error", {}).get("Code"))), "")


def said(error: BaseException) -> str:
    """Return the storage's error as one public line: its code, and its message if it sent one."""
    for link in _chain(error):
        answer = _answer(link).get("Error", {})
        if answer.get("Code"):
            code, message = str(answer["Code"]), " ".join(str(answer.get("Message") or "").split())
            return public_text(code if message in ("", "None", code) else f"{code}: {message}")
        fields = getattr(link, "kwargs", None)  # of botocore; its endpoint_url contains the whole key
        if isinstance(fields, dict) and (url := str(fields.get("endpoint_url") or "")):
            return " ".join(public_text(str(link).replace(url, origin(url))).split())
    return one_line(error)


def origin(url: str) -> str:
    """Return the scheme, host and port of an address."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}" + (f":{parts.port}" if parts.port else "")


def _answer(error: BaseException) -> dict[str, Any]:
    """Return the server's answer, which botocore keeps in its errors."""
    answer = getattr(error, "response", None)
    return answer if isinstance(answer, dict) else {}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes: s3fs raises an OSError from the error that holds the server's answer."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _is_of_client(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in _CLIENTS
