"""The errors of file systems: transient ones, refusals, and those of a full disk.

The only place that translates them. Knows file systems and HTTP statuses; performs no operation.
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
# Client libraries whose exceptions are not OSErrors; recognised by module, so that none has to be imported.
_CLIENTS = {
    *("adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "s3fs"),
    *("httpx", "httpx2", "httpcore", "httpcore2"),  # of huggingface_hub
}
_REFUSALS = (PermissionError, IsADirectoryError, NotADirectoryError)
# A disk that answers with one of these will do so again.
_REFUSAL_ERRNOS = {errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ELOOP, errno.EFBIG, errno.EXDEV}
# HTTP statuses: the transient ones below 500, where others are refusals, and the lasting ones from 500 on.
_TRANSIENT_STATUSES = {408, 409, 412, 425, 429}
_LASTING_STATUSES = {501, 505}
_FULL_STATUSES = {507}
# S3 answers 400 for a body that was cut or changed on its way, and when it waited in vain for the rest of one; and 403
# for a request that was signed long ago, as by a machine that slept meanwhile, or whose clock is being set.
_TRANSIENT_CODES = {"BadDigest", "IncompleteBody", "RequestTimeTooSkewed", "RequestTimeout", "SlowDown"}
_TRANSIENT_CODES |= {"XAmzContentSHA256Mismatch"}
_FULL_CODES = {"QuotaExceeded", "XMinioStorageFull"}  # of Ceph and MinIO
NO_BUCKET = "NoSuchBucket"


@contextmanager
def translated(uri: str, operation: str) -> Iterator[None]:
    """Raise the errors of file systems as StoreErrors that name URI and operation."""
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
    """Return whether another attempt may succeed: the error is no answer about the key, refusal or full disk."""
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
    """Return whether a disk is full, or the quota of this user."""
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
    # huggingface_hub's own error; whoever raised another from it has said more than its status.
    answer = getattr(getattr(error, "response", None), "status_code", None)
    return answer if isinstance(error, OSError) and isinstance(answer, int) else None


def http_status(error: BaseException | None) -> int | None:
    """Return the HTTP status behind an error of any client, whatever was raised from it; None if nobody answered."""
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
    """Return what a storage said as one public line: its code, and its message if it sent one."""
    for link in _chain(error):
        answer = _answer(link).get("Error", {})
        if answer.get("Code"):
            code, message = str(answer["Code"]), " ".join(str(answer.get("Message") or "").split())
            return public_text(code if message in ("", "None", code) else f"{code}: {message}")
        fields = getattr(link, "kwargs", None)  # botocore's, with the address of the whole key
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
    """Yield an error and its causes: s3fs hides the answer of a server behind an OSError."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _is_of_client(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in _CLIENTS
