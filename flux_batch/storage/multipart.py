"""Multipart uploads to S3: put if absent, and the unfinished uploads of killed writers.

A store may honour the condition of a single request but ignore it when an upload is completed, as Ceph's gateway 16.2
does. So one writer at a time looks the key up again right before it completes its upload.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import mimetypes
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from flux_batch.storage.errors import code, status
from flux_batch.storage.retry import with_few_retries
from flux_batch.storage.s3 import ask, ask_bucket, is_there
from flux_batch.storage.turns import turn

# The largest object that S3 accepts in one request; a gateway may accept less, and then answers 413.
MAX_PUT_BYTES = 5 << 30
# The smallest part. S3 allows 10,000 parts of an object.
PART_BYTES = 32 << 20
_MAX_PARTS = 10_000
# Parts that are sent at the same time; each is held in memory.
_PARTS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload in parts that was neither completed nor aborted; `path` has the bucket and the key."""

    path: str
    id: str


async def put_whole(fs: Any, path: str, data: bytes | Path, turns: str) -> None:
    """Create an object in one conditional request; in parts if it is too large for one.

    turns: the folder of the locks of `turn`.
    Raises: FileExistsError, or the error of s3fs for a taken key.
    """
    if _size(data) <= MAX_PUT_BYTES:
        try:
            return await _put(fs, path, data)
        except Exception as error:
            if status(error) != HTTPStatus.REQUEST_ENTITY_TOO_LARGE and code(error) != "EntityTooLarge":
                raise
    await put_in_parts(fs, path, data, turns, is_conditional=True)


async def put_in_parts(fs: Any, path: str, data: bytes | Path, turns: str, *, is_conditional: bool) -> None:
    """Create an object in parts, unless the key is taken when all parts are uploaded.

    turns: the folder of the locks of `turn`, so that one writer at a time completes its upload.
    is_conditional: True if the store knows conditional writes; the last request then carries the condition too.
    Raises: FileExistsError; the upload is then aborted.
    """
    upload = (await ask(fs, "create_multipart_upload", path, **_content_type(path)))["UploadId"]
    try:
        parts = await _upload(fs, path, upload, data)
        async with turn(fs, path, turns):
            if await is_there(fs, path):
                raise FileExistsError(path)
            condition = {"IfNoneMatch": "*"} if is_conditional else {}
            await _complete(fs, path, upload, parts, condition)
    except BaseException:
        with suppress(Exception):  # `list_uploads` finds an upload that stays
            await ask(fs, "abort_multipart_upload", path, UploadId=upload)
        raise


async def list_uploads(fs: Any, folder: str) -> list[Upload]:
    """Return the unfinished uploads of objects in a folder."""
    bucket, prefix, _ = fs.split_path(f"{folder}/")
    found: list[Upload] = []
    marker: dict[str, str] = {}
    while True:
        page = await ask_bucket(fs, "list_multipart_uploads", bucket, Prefix=prefix, **marker)
        found += [Upload(f"{bucket}/{one['Key']}", one["UploadId"]) for one in page.get("Uploads", ())]
        marker = {name: page[f"Next{name}"] for name in ("KeyMarker", "UploadIdMarker") if page.get(f"Next{name}")}
        if not page.get("IsTruncated") or not marker:
            return [upload for upload in found if upload.path.startswith(f"{bucket}/{prefix}")]


async def abort(fs: Any, upload: Upload) -> None:
    """Abort an upload and remove its parts. Safe to call twice."""
    with suppress(FileNotFoundError):
        await ask(fs, "abort_multipart_upload", upload.path, UploadId=upload.id)


async def _put(fs: Any, path: str, data: bytes | Path) -> None:
    fields = {"IfNoneMatch": "*", **await _checksum(fs, data), **_content_type(path)}
    if isinstance(data, bytes):
        await ask(fs, "put_object", path, Body=data, **fields)
        return
    with data.open("rb") as body:
        await ask(fs, "put_object", path, Body=body, **fields)


async def _checksum(fs: Any, data: bytes | Path) -> dict[str, str]:
    """Return the MD5 of a body that is sent over TLS; nothing without TLS.

    Otherwise the client would hash the body in the event loop and hold up all requests, as it must without TLS.
    """
    if not fs._s3.meta.endpoint_url.startswith("https:"):
        return {}
    return {"ContentMD5": await asyncio.to_thread(_md5, data)}


async def _upload(fs: Any, path: str, upload: str, data: bytes | Path) -> list[dict[str, Any]]:
    """Upload all parts, a few at once. Returns: their numbers and tags, for complete_multipart_upload."""
    size = _size(data)
    part_bytes = max(PART_BYTES, -(-size // _MAX_PARTS))
    starts = list(enumerate(range(0, max(size, 1), part_bytes), 1))
    parts: list[dict[str, Any]] = []
    while some := starts[len(parts) : len(parts) + _PARTS_AT_ONCE]:
        parts += await _upload_parts(
            fs, path, upload, {number: _read(data, start, part_bytes) for number, start in some}
        )
    return parts


async def _upload_parts(fs: Any, path: str, upload: str, bodies: dict[int, bytes]) -> list[dict[str, Any]]:
    async def send(number: int, body: bytes) -> dict[str, Any]:
        # Retried here: otherwise one failed part would cause all parts to be sent again.
        answer = await with_few_retries(
            lambda: ask(fs, "upload_part", path, UploadId=upload, PartNumber=number, Body=body)
        )
        return {"PartNumber": number, "ETag": answer["ETag"]}

    tasks = [asyncio.ensure_future(send(number, body)) for number, body in bodies.items()]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:  # a part that arrives after the upload was aborted would stay
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _complete(fs: Any, path: str, upload: str, parts: list[dict[str, Any]], condition: dict[str, str]) -> None:
    named = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
    try:
        await ask(fs, "complete_multipart_upload", path, **named, **condition)
    except Exception as error:
        if not condition or status(error) != HTTPStatus.NOT_IMPLEMENTED:
            raise
        await ask(fs, "complete_multipart_upload", path, **named)


def _size(data: bytes | Path) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size


def _read(data: bytes | Path, start: int, num_bytes: int) -> bytes:
    if isinstance(data, bytes):
        return data[start : start + num_bytes]
    with data.open("rb") as file:
        file.seek(start)
        return file.read(num_bytes)


def _md5(data: bytes | Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    if isinstance(data, bytes):
        digest.update(data)
    else:
        with data.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return base64.b64encode(digest.digest()).decode()


def _content_type(path: str) -> dict[str, str]:
    found, _ = mimetypes.guess_type(path)
    return {"ContentType": found} if found else {}
