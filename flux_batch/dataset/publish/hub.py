"""A data set repository of the Hugging Face Hub: its files, and commits to it, with retries."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flux_batch.errors import FluxBatchError, JobError, StoreError, StoreRefused, one_line
from flux_batch.storage.contact import first_contact
from flux_batch.storage.errors import http_status
from flux_batch.storage.retry import RetryPolicy

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

log = logging.getLogger(__name__)

_SCHEME = "hf://datasets/"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# 409 and 412: another commit came in between.
_TRANSIENT = {408, 409, 412, 425, 429, 500, 502, 503, 504}
_CLIENTS = {"httpx", "httpx2", "httpcore2", "requests"}
# Files that the Hub may keep in git itself are smaller than this. They stay in memory until the commit sends them.
_IN_MEMORY_BYTES = 10_000_000
# Seconds to wait for the Hub during an outage, if it has answered before.
_OUTAGE_S = 600.0
_TIMEOUT_S = 10.0
_LOG_IN = "log in by `hf auth login`, or set HF_TOKEN, with a token that may write there"

T = TypeVar("T")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: its size, and its sha256 if it is large, else git's hash of its contents."""

    size: int
    sha256: str
    git_sha1: str

    def has(self, data: bytes) -> bool:
        """Return whether the file has these bytes."""
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return self.size == len(data) and (self.git_sha1 == blob or self.sha256 == hashlib.sha256(data).hexdigest())


class HubDataset:
    """A data set repository at hf://datasets/OWNER/NAME."""

    def __init__(self, address: str, policy: RetryPolicy | None = None) -> None:
        name = address.removeprefix(_SCHEME)
        if name == address or not _NAME.fullmatch(name):
            raise JobError(
                f"{address}: must be hf://datasets/OWNER/NAME; `flux-batch export` writes to any other place"
            )
        self.address = address
        self._name = name
        self._policy = policy or RetryPolicy(_OUTAGE_S)
        self._has_answered = False

    def check_token(self) -> None:
        """Raise JobError if this machine has no token for the Hub."""
        from huggingface_hub import get_token

        if not get_token():
            raise JobError(f"{self.address}: there is no token for the Hub: {_LOG_IN}")

    def create(self, *, private: bool) -> None:
        """Create the repository unless it exists."""
        self._call(lambda: self._api.create_repo(self._name, repo_type="dataset", private=private, exist_ok=True))

    def files(self) -> dict[str, HubFile]:
        """Return all files by path."""

        def listed() -> dict[str, HubFile]:
            entries = self._api.list_repo_tree(self._name, repo_type="dataset", recursive=True)
            return {entry.path: _file(entry) for entry in entries if hasattr(entry, "blob_id")}

        return self._call(listed)

    def read(self, path: str, scratch: Path) -> bytes:
        """Read a small file; `scratch` is a local folder."""

        def download() -> str:
            return self._api.hf_hub_download(self._name, path, repo_type="dataset", local_dir=scratch)

        return Path(self._call(download)).read_bytes()

    def upload(self, path: str, data: Path) -> CommitOperationAdd:
        """Upload a file. Readers see it only after its commit. A file that the Hub already has is not sent.

        The local file is not needed afterwards.
        """
        from huggingface_hub import CommitOperationAdd

        body = data.read_bytes() if data.stat().st_size < _IN_MEMORY_BYTES else str(data)
        addition = CommitOperationAdd(path, body)
        self._call(lambda: self._api.preupload_lfs_files(self._name, [addition], repo_type="dataset"))
        return addition

    def commit(self, files: Sequence[CommitOperationAdd] | Mapping[str, bytes], message: str) -> None:
        """Commit uploaded files, or small ones as bytes."""
        from huggingface_hub import CommitOperationAdd

        if isinstance(files, Mapping):
            files = [CommitOperationAdd(path, data) for path, data in files.items()]
        operations, attempts = [*files], iter(range(2**31))

        def commit() -> None:
            # The answer to an earlier attempt may have been lost.
            if next(attempts) and self._has(operations):
                return
            self._api.create_commit(self._name, operations, commit_message=message, repo_type="dataset")

        self._call(commit)

    def _has(self, additions: Sequence[CommitOperationAdd]) -> bool:
        files = self.files()
        sizes = {addition.path_in_repo: addition.upload_info for addition in additions}
        return all(
            path in files and files[path].sha256 in ("", info.sha256.hex()) and files[path].size == info.size
            for path, info in sizes.items()
        )

    @cached_property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="flux-batch")

    def _reach(self) -> None:
        """Send the Hub a small request, unless it has answered before. Raises: StoreError if it does not answer.

        This check is needed because other requests have no time limit.
        """
        if self._has_answered:
            return

        def ask() -> None:
            self._api.dataset_info(self._name, timeout=_TIMEOUT_S)

        try:
            first_contact(self._policy).retry(ask, _is_silence, self.address)
        except Exception as error:  # clients of the Hub raise anything; a refusal is also an answer
            if _is_silence(error):
                raise StoreError(f"{self.address}: the Hub cannot be reached: {one_line(error)}") from error
            if http_status(error) is None:
                raise
        self._has_answered = True

    def _call(self, function: Callable[[], T]) -> T:
        """Call the Hub. Raises: StoreRefused for errors that a retry cannot fix, else StoreError."""
        try:
            self._reach()
            return self._policy.retry(function, _is_transient, self.address)
        except FluxBatchError:
            raise
        except Exception as error:  # clients of the Hub raise anything; their message is passed on
            status = http_status(error)
            if status in (401, 403):
                raise StoreRefused(f"{self.address}: the Hub answered {status}: {_LOG_IN}") from error
            if _is_transient(error):
                raise StoreError(f"{self.address}: the Hub does not answer as it should: {one_line(error)}") from error
            if status is not None:
                raise StoreRefused(f"{self.address}: the Hub answered {status}: {one_line(error)}") from error
            raise


def _file(entry: Any) -> HubFile:
    sha256 = entry.lfs.sha256 if entry.lfs else ""
    return HubFile(entry.size, sha256, "" if sha256 else entry.blob_id)


def _is_silence(error: BaseException) -> bool:
    return http_status(error) is None and _is_transient(error)


def _is_transient(error: BaseException) -> bool:
    if (status := http_status(error)) is not None:
        return status in _TRANSIENT
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, ConnectionError | TimeoutError) or type(link).__module__.partition(".")[0] in _CLIENTS:
            return True
        link = link.__cause__
    return False
