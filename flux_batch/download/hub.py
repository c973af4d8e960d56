"""Repositories of Hugging Face and ModelScope: their lists of files with addresses and hashes, and downloads by name.

Errors that a retry cannot fix are raised as ValueError, all others as ConnectionError.
Sources: huggingface_hub; modelscope/modelscope e68c327, modelscope/hub/file_download.py, and
dragonflyoss/client (the bearer token) for ModelScope, whose own client would bring half a framework.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from flux_batch.errors import one_line
from flux_batch.storage.errors import is_full, is_refusal
from flux_batch.telemetry import LOADING

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HF_SCHEME = "hf://"
_MODELSCOPE = "https://www.modelscope.cn"
_TIMEOUT_S = 10.0
_RETRIED_STATUSES = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True, slots=True, kw_only=True)
class _HubFile:
    """A file of a repository, with its sha256 or its git blob id."""

    name: str
    url: str
    size: int | None
    sha256: str = ""
    git_sha1: str = ""


@dataclass(frozen=True)
class Repository:
    """A repository at one revision; `commit` is "" if the hub reports none.

    `headers` must be sent with every request for its files, and are secret.
    """

    name: str
    page: str
    headers: dict[str, str]
    files: tuple[_HubFile, ...]
    commit: str = ""


@dataclass(frozen=True, slots=True)
class HubUri:
    """`hf://owner/repository[@revision][/path]`."""

    repository: str
    revision: str
    path: str

    @classmethod
    def parse(cls, uri: str) -> HubUri:
        """Return the parts of an address. Raises: ValueError that shows a valid one."""
        owner, _, rest = uri.removeprefix(HF_SCHEME).strip("/").partition("/")
        name, _, path = rest.partition("/")
        name, _, revision = name.partition("@")
        if not _REPOSITORY.fullmatch(f"{owner}/{name}"):
            raise ValueError(f"{uri}: must be hf://owner/repository, or hf://owner/repository@revision/path")
        return cls(f"{owner}/{name}", revision or "main", path)


def is_repository_name(text: str) -> bool:
    """Return whether a text is `owner/repository`, optionally with `@revision`."""
    name, _, revision = text.partition("@")
    return bool(_REPOSITORY.fullmatch(name)) and "/" not in revision


def list_huggingface(repository: str, revision: str = "main", token: str | None = None) -> Repository:
    """List the files of a repository of Hugging Face, or of the hub in HF_ENDPOINT.

    token: None takes HF_TOKEN, else the token of `hf auth login`. All files are of one commit.
    Raises: ValueError if it does not exist or is gated, or if HF_HUB_OFFLINE is set; ConnectionError.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, get_token, hf_hub_url

    endpoint = _huggingface_endpoint()
    page = f"{endpoint}/{repository}"
    with _huggingface_errors(repository, revision, page):
        token = token or get_token()
        api = HfApi(endpoint=endpoint, token=token)
        info = api.model_info(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
        files = tuple(
            _HubFile(
                name=file.rfilename,
                url=hf_hub_url(repository, file.rfilename, revision=info.sha, endpoint=endpoint),
                size=file.size,
                sha256=file.lfs.sha256 if file.lfs else "",
                git_sha1="" if file.lfs else file.blob_id or "",
            )
            for file in info.siblings or []
        )
        # Anyone can list a gated repository; only a request for a file shows whether the token may read it.
        for file in sorted(files, key=lambda file: -(file.size or 0))[:1]:
            get_hf_file_metadata(file.url, token=token, endpoint=endpoint, timeout=_TIMEOUT_S)
    return Repository(repository, page, _bearer(token), files, info.sha or "")


def download_snapshot(repository: str, revision: str, names: Sequence[str]) -> Path:
    """Download files of a repository into Hugging Face's cache, and return its snapshot folder.

    Files that are already there are not read again. Raises: the errors of list_huggingface; OSError of the disk.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # a module of that name hides it

    class Bar(tqdm):
        """The hub's progress bar, shown or not; each step also counts as progress of this process."""

        def update(self, n: float | None = 1) -> bool | None:
            """Add files or bytes."""
            LOADING.beat()
            return bool(super().update(n))

    endpoint = _huggingface_endpoint()
    patterns = [glob.escape(name) for name in names]
    with _huggingface_errors(repository, revision, f"{endpoint}/{repository}"):
        return Path(
            snapshot_download(repository, revision=revision, endpoint=endpoint, allow_patterns=patterns, tqdm_class=Bar)
        )


def cached_file(repository: str, name: str, revision: str) -> Path | None:
    """Return the path of a repository's file in Hugging Face's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def huggingface_cache() -> Path:
    """Return the folder of Hugging Face's cache, which HF_HUB_CACHE or HF_HOME names."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _huggingface_endpoint() -> str:
    """Return the address of Hugging Face, or of the hub that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def list_modelscope(repository: str, revision: str = "master", token: str | None = None) -> Repository:
    """List the files of a repository of ModelScope, or of the server in MODELSCOPE_ENDPOINT.

    token: None takes MODELSCOPE_API_TOKEN; public repositories need none.
    Raises: ValueError if it does not exist or may not be read; ConnectionError.
    """
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT", _MODELSCOPE).rstrip("/")
    token = token or os.environ.get("MODELSCOPE_API_TOKEN")
    headers = _bearer(token)
    page = f"{endpoint}/models/{repository}"
    root = f"{endpoint}/api/v1/models/{quote(repository)}/repo"
    answer = _read_json(f"{root}/files?{urlencode({'Revision': revision, 'Recursive': 'True'})}", headers, page)
    try:
        entries = [entry for entry in answer["Data"]["Files"] if entry["Type"] != "tree"]
        files = tuple(
            _HubFile(
                name=str(entry["Path"]),
                url=f"{root}?{urlencode({'Revision': revision, 'FilePath': entry['Path']})}",
                size=int(entry["Size"]),
                sha256=str(entry.get("Sha256") or ""),
            )
            for entry in entries
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = answer.get("Message") if isinstance(answer, dict) else None
        raise ValueError(f"{page}: the hub returned no list of files: {reason or 'another answer'}") from error
    return Repository(repository, page, headers, files)


def _bearer(token: str | None) -> dict[str, str]:
    """Return the header with a token."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def _read_json(url: str, headers: dict[str, str], page: str) -> Any:
    """Read a JSON answer. Raises: ValueError, ConnectionError."""
    request = Request(url)
    for key, value in headers.items():
        request.add_unredirected_header(key, value)  # a redirect must not get the token
    try:
        with urlopen(request, timeout=_TIMEOUT_S) as response:
            return json.load(response)
    except HTTPError as error:
        if error.code in _RETRIED_STATUSES:
            raise ConnectionError(f"the hub answered {error.code} for {page}") from error
        if error.code in (401, 403):
            raise ValueError(
                f"{page}: may not be read: log in there, accept the licence if one is shown, and pass a token of that "
                "account (MODELSCOPE_API_TOKEN or --token)"
            ) from error
        raise ValueError(f"{page}: no such repository or revision (the hub answered {error.code})") from error
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"{page} cannot be reached: {error}") from error
    except ValueError as error:
        raise ConnectionError(f"{page}: the answer is not JSON: {error}") from error


@contextmanager
def _huggingface_errors(repository: str, revision: str, page: str) -> Iterator[None]:
    """Run the block and translate errors of huggingface_hub into ValueError or ConnectionError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{repository} is gated: log in at {page}, accept its licence, and pass a token of that account "
            "(HF_TOKEN, --token or `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{page}: has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{page}: there is no such repository, or it is private and the token (HF_TOKEN, --token) may not read it"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise ValueError(f"{repository} is not on this machine, and HF_HUB_OFFLINE forbids downloading it") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in _RETRIED_STATUSES:
            raise ConnectionError(f"the hub answered {status} for {page}") from error
        hint = "the token is refused; renew it (HF_TOKEN, --token)" if status == 401 else f"it answered {status}"
        raise ValueError(f"{page}: cannot be read: {hint}") from error
    except (ConnectionError, ValueError):
        raise
    except Exception as error:
        if is_full(error) or is_refusal(error):  # errors of the disk
            raise
        # The HTTP client of huggingface_hub has changed twice. The module of an error shows it without an import.
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in {"httpx", "httpx2", "requests"}:
            cause = error.__cause__ or error
            reason = one_line(cause)
            raise ConnectionError(f"{page} cannot be reached: {reason}") from error
        raise
