"""Repositories of Hugging Face in its own cache, which other programs share: fetched by huggingface_hub, checked here.

A manifest in the cache of this package says where a copy lies and which bytes were checked, so that the copy can be
used without a request to the hub. HF_HOME, HF_HUB_CACHE and HF_TOKEN have their usual meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flux_batch.download.hub import HF_SCHEME, HubUri, cached_file, download_snapshot, huggingface_cache
from flux_batch.download.local_copy import (
    LOCK,
    MANIFEST,
    KeptFile,
    Manifest,
    cache_dir_of,
    current_snapshot,
    file_names,
    manifest_of,
    size_of,
)
from flux_batch.download.transfer import NUM_STREAMS, Listing, RemoteFile, check_room, sha256_if_same
from flux_batch.errors import StoreError
from flux_batch.model.checkpoint.files import missing_components
from flux_batch.storage.errors import translated
from flux_batch.storage.retry import with_retries


def repository_cache_dir(hub: HubUri) -> Path:
    """Return the folder of the manifest for an address of a repository."""
    return cache_dir_of(f"{HF_SCHEME}{hub.repository}@{hub.revision}/{hub.path}", {})


def find_repository(hub: HubUri) -> Path | None:
    """Return the local folder of a model's address; None if it is incomplete.

    The address may name a part of the model. No request is sent to the hub. A model that another program has fetched
    counts if it is complete by its file names.
    """
    cache_dir = repository_cache_dir(hub)
    if found := current_snapshot(cache_dir):
        return found
    # A killed download of ours may be incomplete although its file names are complete.
    return None if hub.path or (cache_dir / LOCK).exists() else _find_model(hub)


def _find_model(hub: HubUri) -> Path | None:
    """Return a repository's folder in Hugging Face's cache; None unless it holds a complete model."""
    index = cached_file(hub.repository, "model_index.json", hub.revision)
    return None if index is None or missing_components(file_names(index.parent)) else index.parent


def fetch_repository(hub: HubUri, listing: Listing, folder: str) -> Path:
    """Fetch the listed files of a repository's `folder` into Hugging Face's cache; return its path.

    Existing files are not fetched again; each is checked by size and hash once.
    Raises: DiskFull if the disk is too small, StoreError for a file that arrives damaged or not at all.
    """
    names = {file: f"{folder}/{file.name}".lstrip("/") for file in listing.files}
    cache = huggingface_cache()
    with translated(str(cache), "keep a copy (HF_HUB_CACHE sets another folder)"):
        cache.mkdir(parents=True, exist_ok=True)
        repository_cache_dir(hub).mkdir(parents=True, exist_ok=True)
    present = {file.name for file, name in names.items() if cached_file(hub.repository, name, listing.commit)}
    num_bytes = sum(file.size or 0 for file in listing.files if file.name not in present)
    check_room(cache, num_bytes, listing.uri, variable="HF_HUB_CACHE")
    snapshot = with_retries(
        listing.uri, "fetch", lambda: download_snapshot(hub.repository, hub.revision, list(names.values()))
    )
    if snapshot.name != listing.commit:
        raise StoreError(f"{listing.uri}: was changed while it was copied; run the same command again")
    path = repository_cache_dir(hub) / MANIFEST
    manifest = Manifest.read(path)
    checked = {name: kept for name, kept in manifest.files.items() if name in present} if manifest else {}
    sha256 = _check_files(listing, snapshot / folder, checked)
    manifest_of(listing, sha256, snapshot / folder, str(snapshot / folder)).write(path)
    return snapshot / folder


def _check_files(listing: Listing, folder: Path, checked: Mapping[str, KeptFile]) -> dict[str, str]:
    """Return the sha256 of every listed file; files that are unchanged since `checked` are not read.

    Raises: StoreError for a damaged file, which is removed.
    """

    def check(file: RemoteFile) -> str:
        kept, path = checked.get(file.name), folder / file.name
        if kept and (kept.size, kept.content) == (file.size, file.content) and size_of(path) == file.size:
            return kept.sha256
        if sha256 := sha256_if_same(path, file):
            return sha256
        path.resolve().unlink(missing_ok=True)  # the file that the link points to
        path.unlink(missing_ok=True)
        raise StoreError(
            f"{listing.uri}: {file.name} arrived damaged: it should have {file.size} bytes with {file.content}; "
            "run the same command again"
        )

    with ThreadPoolExecutor(NUM_STREAMS, thread_name_prefix="check") as pool:
        return dict(zip((file.name for file in listing.files), pool.map(check, listing.files), strict=True))
