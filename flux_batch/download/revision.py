"""Which version of a model an address stands for: tells a run from one with other weights under that name."""

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
    kind_of,
    local_model,
    repository_listing,
    source_errors,
    storage_listing,
)
from flux_batch.errors import FluxBatchError
from flux_batch.model.checkpoint.files import needed_files

# Of each end of a file on this machine: 34 GB are not read for a name, and training leaves no weight as it was.
END_BYTES = 64 << 10
BRANCH = "main"

log = logging.getLogger(__name__)


def model_revision(uri: str, storage_options: Mapping[str, Any] | None = None) -> str | None:
    """Name the version of the files of a model as they are now; nothing is fetched.

    Of a repository of Hugging Face, the revision that the address names, else the commit that is here, else the one
    that the hub names. Of a bucket, the name that a copy has in our cache: a hash of names, sizes and what the store
    says of the bytes. Of files on this machine, a hash of names, sizes and both ends of each.
    Returns: None for an address on the web, and if they are not here and whoever has them cannot be asked, which is no
    reason for an error.
    """
    try:
        with source_errors():
            return _revision(uri, storage_options or {})
    except (FluxBatchError, OSError, TypeError) as error:  # the last for options that a storage does not know
        log.debug("the revision of the model cannot be told: %s", error)
        return None


def _revision(uri: str, storage_options: Mapping[str, Any]) -> str | None:
    if uri.startswith(("http://", "https://")):
        return None  # libraries log what they ask, and its query may be a signature
    kind = kind_of(uri)
    if uri == "demo" or kind in ("local", "file"):
        return _of_files(local_model(uri))
    if kind == "storage":
        return storage_listing(uri, storage_options).fingerprint
    hub = HubUri.parse(uri)
    if hub.revision != BRANCH:
        return hub.revision
    found = None if hub.path else find_repository(hub)
    return found.name if found else repository_listing(uri).commit


def _of_files(model: Path) -> str:
    """Hash a folder, or a file with all parts."""
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
