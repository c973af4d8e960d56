"""The version of the model at an address, which distinguishes weights with the same name."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux_batch.download.hub import HubUri
from flux_batch.download.hub_cache import find_repository
from flux_batch.download.local_copy import file_names
from flux_batch.download.models import (
    local_model,
    repository_listing,
    source_errors,
    source_kind,
    storage_listing,
)
from flux_batch.errors import FluxBatchError
from flux_batch.model.checkpoint.files import needed_files

# The number of bytes to hash at each end of a local file: 34 GB are too many to read, and training changes all weights.
END_BYTES = 64 << 10
_BRANCH = "main"

log = logging.getLogger(__name__)


def model_revision(uri: str, storage_options: Mapping[str, Any] | None = None) -> str | None:
    """Return a name for the current version of a model's files; fetch nothing.

    For a repository of Hugging Face: the revision in the address, else the local commit, else the commit that the hub
    reports. For a bucket: the name of a copy in our cache, a hash of names, sizes and the store's identifiers of the
    bytes. For local files: a hash of names, sizes and both ends of each.
    Returns: None for an address on the web, and for files without a local copy if the remote cannot be asked.
    """
    try:
        with source_errors():
            return _revision(uri, storage_options or {})
    except (FluxBatchError, OSError, TypeError) as error:  # TypeError: options that a storage does not know
        log.debug("the revision of the model cannot be determined: %s", error)
        return None


def _revision(uri: str, storage_options: Mapping[str, Any]) -> str | None:
    if uri.startswith(("http://", "https://")):
        return None  # libraries log the address, and its query may be a signature
    kind = source_kind(uri)
    if uri == "demo" or kind in ("local", "file"):
        return _of_files(local_model(uri))
    if kind == "storage":
        return storage_listing(uri, storage_options).fingerprint
    hub = HubUri.parse(uri)
    if hub.revision != _BRANCH:
        return hub.revision
    found = None if hub.path else find_repository(hub)
    return found.name if found else repository_listing(uri).commit


def _of_files(model: Path) -> str:
    """Return a hash of a model folder, or of a file with all parts."""
    names = needed_files(file_names(model)) if model.is_dir() else [""]
    digest = hashlib.sha256()
    for name in names:
        path = model / name
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(END_BYTES)
            file.seek(max(0, size - END_BYTES))
            digest.update(repr((name, size, head, file.read())).encode())
    return digest.hexdigest()[:16]
