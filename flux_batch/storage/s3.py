"""Settings of S3 clients, and requests to S3.

They are the requests for which s3fs has no public method, or a method that sends several requests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from http import HTTPStatus
from typing import Any

from flux_batch.storage.entries import Entry
from flux_batch.storage.errors import is_refusal, status

# The most keys of one request to delete.
MAX_DELETES = 1000
_ASK = "_call_s3"
# By default botocore compares the checksum in a response: some servers send that of the whole object with a part of
# it. It also sends a checksum after the body over HTTPS, which other servers refuse (411, Ceph's gateway 16.2).
# The environment and storage_options may set other values.
_CHECKSUMS = {
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "response_checksum_validation",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "request_checksum_calculation",
}
# The connect timeout.
_CONNECT_S = 10


def client_settings(num_retries: int) -> dict[str, Any]:
    """Return the settings of S3 clients that suit every store."""
    checksums = {option: "when_required" for name, option in _CHECKSUMS.items() if name not in os.environ}
    return {**checksums, "connect_timeout": _CONNECT_S, "retries": {"max_attempts": num_retries}}


def is_s3(fs: Any) -> bool:
    """Return whether a file system is s3fs."""
    return hasattr(fs, _ASK)


async def ask(fs: Any, operation: str, path: str, **fields: Any) -> Any:
    """Send one request about an object. Returns: the answer, by field."""
    bucket, key, _ = fs.split_path(path)
    return await getattr(fs, _ASK)(operation, Bucket=bucket, Key=key, **fields)


async def ask_bucket(fs: Any, operation: str, path: str, **fields: Any) -> Any:
    """Send one request about the bucket of a path. Returns: the answer, by field."""
    bucket, _, _ = fs.split_path(path)
    return await getattr(fs, _ASK)(operation, Bucket=bucket, **fields)


async def is_there(fs: Any, path: str) -> bool:
    """Return whether an object exists; False if its bucket does not exist."""
    try:
        await ask(fs, "head_object", path)
    except FileNotFoundError:
        return False
    return True


async def read_whole(fs: Any, path: str) -> bytes:
    """Read an object in one request."""
    return bytes(await fs._cat_file(path, max_concurrency=1))


async def list_folder(fs: Any, folder: str) -> list[str]:
    """Return the paths of all objects under a folder, with one request for each 1,000."""
    return [entry["name"] for entry in await fs._lsdir(folder.rstrip("/"), delimiter="")]


def entries_of(
    fs: Any, folder: str, after: str, wait_for: Callable[[Coroutine[Any, Any, Any]], Any]
) -> Iterator[Entry]:
    """Yield the entries of a folder that sort after `after`.

    It takes one request for each 1,000. wait_for: runs a request and returns its result.
    """
    _, prefix, _ = fs.split_path(f"{folder}/")
    where = {"StartAfter": f"{prefix}{after}"} if after else {}
    while True:
        page = wait_for(ask_bucket(fs, "list_objects_v2", folder, Prefix=prefix, Delimiter="/", **where))
        for one in page.get("Contents", ()):
            if name := one["Key"].removeprefix(prefix):
                yield name, int(one["Size"])
        for one in page.get("CommonPrefixes", ()):
            yield one["Prefix"].removeprefix(prefix).rstrip("/"), None
        if not page.get("IsTruncated"):
            return
        where = {"ContinuationToken": page["NextContinuationToken"]}


async def delete_many(fs: Any, paths: Sequence[str]) -> Sequence[str]:
    """Remove at most MAX_DELETES objects of one bucket in one request. Returns: those that it did not remove."""
    objects = [{"Key": fs.split_path(path)[1]} for path in paths]
    try:
        answer = await ask_bucket(fs, "delete_objects", paths[0], Delete={"Objects": objects, "Quiet": True})
    except Exception as error:
        if not is_refusal(error) and status(error) != HTTPStatus.NOT_IMPLEMENTED:
            raise
        return paths
    refused = {entry.get("Key") for entry in answer.get("Errors", ())}
    return [path for path, one in zip(paths, objects, strict=True) if one["Key"] in refused]


async def keeps_versions(fs: Any, path: str) -> bool:
    """Return whether the bucket of a path has versioning enabled."""
    return bool((await ask_bucket(fs, "get_bucket_versioning", path)).get("Status") == "Enabled")
