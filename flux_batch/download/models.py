"""From the name, path or address of a model to a folder on this machine.

This file connects the list of a model's files (model/) with the transfer of bytes (storage/).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from flux_batch.download.hub import HF_SCHEME, HubUri, Repository, is_repository_name, list_huggingface, list_modelscope
from flux_batch.download.hub_cache import fetch_repository, find_repository, repository_cache_dir
from flux_batch.download.local_copy import (
    FOLDER_LOCK,
    cache_dir_of,
    current_snapshot,
    file_names,
    fill_folder,
    is_filled,
    list_file,
    list_folder,
    local_copy,
)
from flux_batch.download.transfer import Listing, RemoteFile
from flux_batch.errors import CheckpointError, DiskFull, NotFound, StoreError, StoreRefused, did_you_mean
from flux_batch.model.checkpoint.files import (
    LISTED_FOLDERS,
    WEIGHT_SUFFIXES,
    is_pickle,
    is_weight,
    missing_components,
    needed_files,
    part_of,
)
from flux_batch.redaction import public_uri
from flux_batch.storage.contact import first_contact
from flux_batch.storage.errors import http_status
from flux_batch.storage.filesystem import open_filesystem
from flux_batch.storage.retry import RetryPolicy, with_retries

PathOrFolder = str | PathLike[str]

_DOWNLOAD_FOLDER = Path("models")
# The name for a file whose address has none, and the longest header of safetensors: safetensors 0.6, src/tensor.rs.
_UNNAMED_FILE = "download.safetensors"
_MAX_HEADER_BYTES = 100_000_000
# The models of DiffSynth-Studio 1.x and their repositories on both hubs.
# Source: modelscope/DiffSynth-Studio v1.1.9, diffsynth/configs/model_config.py.
_PRESETS = {
    "FLUX.1-dev": {"huggingface": "black-forest-labs/FLUX.1-dev", "modelscope": "AI-ModelScope/FLUX.1-dev"},
    "FLUX.1-schnell": {"huggingface": "black-forest-labs/FLUX.1-schnell", "modelscope": "AI-ModelScope/FLUX.1-schnell"},
}
# fsspec's options for web addresses: those of HTTPFileSystem, and those of a request of aiohttp.
_WEB_OPTIONS = frozenset({"auth", "block_size", "client_kwargs", "cookies", "headers", "proxy", "ssl", "timeout"})
_LIST_OF_HUB = {"huggingface": list_huggingface, "modelscope": list_modelscope}

log = logging.getLogger(__name__)


def download_models(
    model_id_list: str | Sequence[str],
    downloading_priority: Sequence[str] = ("HuggingFace", "ModelScope"),
    *,
    to: PathOrFolder | None = None,
    token: str | None = None,
) -> list[Path]:
    """Download models unless they exist, and return their folders.

    FLUX.1-dev and FLUX.1-schnell go to models/FLUX/<name>, as original single files with their settings, as the scripts
    of DiffSynth-Studio expect; any `owner/repository` goes to models/<owner>/<repository>. `to`: another folder, for a
    single model. If a hub cannot be reached, the next one is asked. A complete model needs no network. Every file is
    checked by size and hash; the next call continues a killed download.
    Raises: CheckpointError for an unknown name, or a repository that does not exist or is gated; DiskFull; StoreRefused
    if another file of the same name is in the way; StoreError if no hub can be reached.
    """
    hubs = [hub.lower() for hub in downloading_priority]
    if unknown := [hub for hub in hubs if hub not in _LIST_OF_HUB]:
        raise CheckpointError(f"{unknown[0]}: no such hub; there are HuggingFace and ModelScope")
    names = [model_id_list] if isinstance(model_id_list, str) else list(model_id_list)
    if to is not None and len(names) != 1:
        raise CheckpointError(f"one folder for {len(names)} models: download them one by one")
    return [_download_model(name, hubs, Path(to) if to else _download_folder(name), token) for name in names]


def _download_model(name: str, hubs: Sequence[str], folder: Path, token: str | None) -> Path:
    """Download one model into `folder` from the first hub that can be reached."""
    if name not in _PRESETS and not is_repository_name(name):
        raise CheckpointError(f"{name}: no such model; there are {', '.join(_PRESETS)}, or name it owner/repository")
    if is_filled(folder) or _is_filled_by_others(folder, name):
        return folder
    unreachable: list[str] = []
    for hub in hubs:
        repository, _, revision = _PRESETS.get(name, {}).get(hub, name).partition("@")
        options = {"revision": revision} if revision else {}
        list_files = partial(_LIST_OF_HUB[hub], repository, token=token, **options)
        try:
            with source_errors():
                fill_folder(folder, partial(_hub_listing, list_files, name, single_files=name in _PRESETS))
            return folder
        except (StoreRefused, DiskFull):
            raise
        except StoreError as error:
            unreachable.append(str(error))
            log.warning("%s", error)
    raise StoreError("; ".join(unreachable))


def _download_folder(name: str) -> Path:
    """Return the default folder for a download of that name."""
    return _DOWNLOAD_FOLDER / "FLUX" / name if name in _PRESETS else _DOWNLOAD_FOLDER / name


def _is_filled_by_others(folder: Path, name: str) -> bool:
    """Return whether a folder that others filled holds a complete model, by its file names."""
    if (folder / FOLDER_LOCK).exists():  # filled by this program: its manifest decides
        return False
    names = file_names(folder)
    if name not in _PRESETS:
        return not missing_components(names)
    single_files = {f"{name.lower().replace('flux.1', 'flux1')}.safetensors", "ae.safetensors"}
    can_lack = {"transformer", "vae"} if single_files <= set(names) else set()
    return can_lack.issuperset(missing_components([each for each in names if "/" in each]))


def local_model(uri: PathOrFolder, storage_options: Mapping[str, Any] | None = None, *, refresh: bool = False) -> Path:
    """Return the local folder of the model that `uri` names, or its single file.

    uri: a path, a file:// address or `demo`; any address that fsspec supports (s3://, gs://, https://);
    hf://owner/repository, with @revision if it is not `main`, or owner/repository if there is no such local folder. A
    remote model is fetched once for each machine, only the files that a model needs, into the cache of Hugging Face or
    of this package (FLUX_BATCH_CACHE). It is then used without a request, unless `refresh` checks for changes.
    Raises: CheckpointError if it does not exist; DiskFull, StoreRefused, StoreError.
    """
    if str(uri) == "demo":
        from flux_batch.demo.paths import demo_model_folder

        return demo_model_folder()
    path = local_path(uri, storage_options, refresh=refresh)
    if not path.exists():
        raise CheckpointError(
            f"no model folder {path}: `flux-batch download FLUX.1-dev` makes one; buckets (s3://bucket/flux) and "
            f"repositories (hf://owner/name) are models too{did_you_mean(path.name, ['demo'])}"
        )
    return path


def local_path(uri: PathOrFolder, storage_options: Mapping[str, Any] | None = None, *, refresh: bool = False) -> Path:
    """Return the local path of a file or folder at `uri`. A local path need not exist.

    Addresses work as for `local_model`. An address of one component fetches it with its settings and tokenizers, in the
    model's folder structure.
    """
    text = str(uri)
    kind = source_kind(text)
    if kind == "local":
        return Path(text).expanduser()
    if kind == "file":
        return Path(url2pathname(urlsplit(text).path))
    if is_pickle(public_uri(text)):
        raise CheckpointError(
            f"{text} is a pickle, which can run any code when read: use the .safetensors file instead"
        )
    with source_errors():
        if kind == "hub":
            return _from_hub(text, refresh=refresh)
        return _from_storage(text, _options_for(text, storage_options), refresh=refresh)


def find_local_model(uri: str, storage_options: Mapping[str, Any] | None = None) -> Path | None:
    """Return the local folder or file of a model, without a request; None if there is no copy."""
    kind = source_kind(uri)
    if uri == "demo" or kind in ("local", "file"):
        path = local_model(uri) if uri == "demo" else local_path(uri)
        return path if path.exists() else None
    if kind == "hub":
        with source_errors():
            hub = HubUri.parse(uri)
        snapshot, part = find_repository(hub), _model_and_part(hub)[1]
    else:
        snapshot = current_snapshot(cache_dir_of(uri, _options_for(uri, storage_options)))
        part = _part_in(snapshot, uri) if snapshot else ""
    return snapshot / part if snapshot else None


def absolute_model_uri(uri: str) -> str:
    """Return a relative path as an absolute one, and any other address unchanged."""
    is_path = uri != "demo" and source_kind(uri) == "local"
    return os.path.abspath(os.path.expanduser(uri)) if is_path else uri


def source_kind(uri: str) -> str:
    """Return the kind of a model's source: `local`, `file`, `hub` or `storage`."""
    if "://" not in uri:
        is_name = is_repository_name(uri) and not (is_pickle(uri) or uri.endswith(WEIGHT_SUFFIXES))
        return "hub" if is_name and not os.path.exists(uri) else "local"
    scheme = uri.partition("://")[0]
    return {"file": "file", "hf": "hub"}.get(scheme, "storage")


def _from_storage(uri: str, storage_options: Mapping[str, Any], *, refresh: bool) -> Path:
    """Return the local copy of a remote folder or file that fsspec reads."""
    list_files = partial(storage_listing, uri, storage_options)
    folder = local_copy(cache_dir_of(uri, storage_options), list_files, refresh=refresh)
    return folder / _part_in(folder, uri)


def _part_in(folder: Path, uri: str) -> str:
    """Return the path of the part of a copied model that an address names."""
    return part_of(_address(uri))[1] or (_UNNAMED_FILE if (folder / _UNNAMED_FILE).exists() else "")


def model_listing(uri: str, storage_options: Mapping[str, Any] | None = None) -> Listing:
    """List the files of a remote model on its hub or storage.

    A hub that does not answer is retried only briefly. Raises: the errors of local_model.
    """
    with source_errors():
        if source_kind(uri) == "hub":
            return repository_listing(uri, first_contact())
        return storage_listing(uri, _options_for(uri, storage_options))


def is_silent_hub(uri: str, error: StoreError) -> bool:
    """Return whether an error of a listing is about a hub that never answered."""
    return source_kind(uri) == "hub" and http_status(error) is None


def storage_listing(uri: str, storage_options: Mapping[str, Any]) -> Listing:
    """List the files that a model needs from a folder or file that fsspec reads."""
    root, part = part_of(_address(uri))
    choose = partial(needed_files, part=part)
    if is_weight(part):
        return list_file(uri, part, root, storage_options, LISTED_FOLDERS, choose)
    if not _is_web(uri):
        return list_folder(root, storage_options, LISTED_FOLDERS, choose)
    if _begins_as_safetensors(uri, storage_options):
        return list_file(uri, _UNNAMED_FILE, root, storage_options, (), partial(needed_files, part=_UNNAMED_FILE))
    try:
        return list_folder(root, storage_options, LISTED_FOLDERS, choose)
    except NotFound as error:
        raise NotFound(
            f"{public_uri(uri)}: answers neither with a safetensors file nor with a list of files; one that needs a "
            "login answers with a page"
        ) from error


def _begins_as_safetensors(uri: str, storage_options: Mapping[str, Any]) -> bool:
    """Return whether a web address answers with a safetensors file, as Civitai's do."""
    fs, path = open_filesystem(uri, storage_options, num_retries=1)  # `with_retries` tries again
    try:
        head = with_retries(public_uri(uri), "look up", lambda: bytes(fs.cat_file(path, start=0, end=9))[:9])
    except NotFound:
        return False
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER_BYTES


def _from_hub(uri: str, *, refresh: bool) -> Path:
    """Return the local copy of a Hugging Face repository, or of a part of it."""
    hub = HubUri.parse(uri)
    folder, part = _model_and_part(hub)
    if not refresh and (found := find_repository(hub)):
        return found / part
    fetch = partial(fetch_repository, hub, folder=folder)
    list_files = partial(repository_listing, uri)
    try:
        return local_copy(repository_cache_dir(hub), list_files, fetch_files=fetch, refresh=refresh) / part
    except ValueError as error:
        if "://" in uri:
            raise
        raise ValueError(f"there is no folder {uri} here, and as a repository: {error}") from error


def repository_listing(uri: str, policy: RetryPolicy | None = None) -> Listing:
    """List the files that a model needs from a repository of Hugging Face.

    The address may name a part of the model.
    """
    hub = HubUri.parse(uri)
    folder, part = _model_and_part(hub)
    list_files = partial(list_huggingface, hub.repository, hub.revision)
    return _hub_listing(list_files, uri, folder=folder, part=part, policy=policy)


def _model_and_part(hub: HubUri) -> tuple[str, str]:
    """Return the model's folder in a repository, and the part that an address names.

    The part is "" if the address names the whole model.
    """
    base = f"{HF_SCHEME}{hub.repository}"
    root, part = part_of(f"{base}/{hub.path}") if hub.path else (base, "")
    return root.removeprefix(base).strip("/"), part


def _hub_listing(
    list_files: Callable[[], Repository],
    uri: str,
    *,
    folder: str = "",
    part: str = "",
    single_files: bool = False,
    policy: RetryPolicy | None = None,
) -> Listing:
    """List the files that a model needs from a repository, to be read over HTTP."""
    repository = (policy or RetryPolicy()).with_retries(uri, "list", list_files)
    prefix = f"{folder}/" if folder else ""
    files = {file.name.removeprefix(prefix): file for file in repository.files if file.name.startswith(prefix)}
    chosen = needed_files(files, part=part, single_files=single_files)
    if not any(is_weight(name) for name in chosen):
        raise ValueError(f"{repository.page}: holds no weights{f' under {part or folder}' if part or folder else ''}")
    # Without compression, since a range must hold the bytes of the file.
    headers = {**repository.headers, "Accept-Encoding": "identity"}
    fs, _ = open_filesystem(repository.page, {"client_kwargs": {"headers": headers}})
    return Listing(
        repository.page,
        fs,
        tuple(
            RemoteFile(name=name, path=file.url, size=file.size, sha256=file.sha256, git_sha1=file.git_sha1)
            for name, file in ((name, files[name]) for name in chosen)
        ),
        repository.commit,
    )


@contextmanager
def source_errors() -> Iterator[None]:
    """Run the block and raise refusals of hubs as CheckpointError."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _address(uri: str) -> str:
    """Return an address without a web query, which is not part of a file's name."""
    return uri.partition("?")[0] if _is_web(uri) else uri


def _options_for(uri: str, storage_options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the options for an address; a web address gets only the options that the web supports."""
    options = storage_options or {}
    return {} if _is_web(uri) and not _WEB_OPTIONS.issuperset(options) else options


def _is_web(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))
