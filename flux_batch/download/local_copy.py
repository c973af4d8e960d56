"""Local copies of remote folders, made once, by one process, complete or not at all.

Each remote folder has a folder of its own in the cache:

    manifest.json           names the snapshot and its files with size and sha256; written last, replaced atomically
    3f2a91c04b7de815/           the snapshot, named after its listing; never changed
    failed.json             why the last transfer failed, for processes that waited for it
    3f2a91c04b7de815.partial/   an unfinished transfer; the next process continues it

A copy is used without a request to the remote, however old it is: a warm cache needs no network. `refresh` compares it
with the listing of the remote, and fetches changed files into a new snapshot, which links the unchanged ones. The
previous snapshot stays, since other processes may be reading it; older ones are removed. If the remote cannot be
reached for a refresh, a warning says so and the copy is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any

from flux_batch.download.transfer import Listing, RemoteFile, download_files, sha256_if_same
from flux_batch.errors import DiskFull, NotFound, StoreError, StoreRefused
from flux_batch.redaction import public_uri
from flux_batch.storage.errors import translated
from flux_batch.storage.filesystem import open_filesystem
from flux_batch.storage.retry import with_retries
from flux_batch.telemetry import LOADING

MANIFEST = "manifest.json"
# The names by which fsspec's file systems report a value that changes with the bytes.
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "Last-Modified", "created")
# Our files in a user's own folder.
LOCK = ".lock"
_FAILED = "failed.json"
FOLDER_MANIFEST, FOLDER_LOCK, _FOLDER_PARTIAL = ".flux-batch.json", ".flux-batch.lock", ".flux-batch-partial"

# Longer than processes that start together normally wait for each other.
WARN_AFTER_S = 5.0

log = logging.getLogger(__name__)

_Choose = Callable[[list[str]], Iterable[str]]
_Fetch = Callable[[Listing], Path]


@dataclass(frozen=True)
class KeptFile:
    """The facts of a fetched file; `content` is the remote's identifier of its bytes."""

    size: int
    content: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a copy and the address that they came from.

    `snapshot`: the copy's folder, absolute or relative to the manifest's folder.
    """

    uri: str
    snapshot: str
    files: dict[str, KeptFile]

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """Read a manifest; None if it is missing or damaged."""
        try:
            tree = json.loads(path.read_text())
            files = {name: KeptFile(**facts) for name, facts in tree["files"].items()}
            return cls(tree["uri"], tree["snapshot"], files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, path: Path) -> None:
        """Write the manifest atomically."""
        scratch = path.with_name(f".{path.name}.new")
        scratch.write_text(json.dumps(asdict(self), indent=1))
        os.replace(scratch, path)

    def complete_folder(self, manifest_folder: Path) -> Path | None:
        """Return the copy's folder if every file has the recorded size, else None."""
        folder = manifest_folder / self.snapshot
        is_whole = all(size_of(folder / name) == kept.size for name, kept in self.files.items())
        return folder if is_whole else None


def local_copy(
    cache_dir: Path, list_files: Callable[[], Listing], *, fetch_files: _Fetch | None = None, refresh: bool = False
) -> Path:
    """Return the folder that holds the listed files, after fetching missing ones.

    `fetch_files`: fetches a listing, writes the manifest and returns the folder; without it, a snapshot is made here.
    Many processes may call this at once: one of them fetches, and if it is killed, the next continues. If it fails, all
    waiting processes fail with its error, so that not every process of a machine asks the remote.
    Raises: StoreError for a remote that cannot be reached, StoreRefused for one that refuses, DiskFull.
    """
    found = current_snapshot(cache_dir)
    if found and not refresh:
        return found
    with translated(str(cache_dir), "keep a copy (FLUX_BATCH_CACHE sets another folder)"):
        cache_dir.mkdir(parents=True, exist_ok=True)
        failed_before = _failure(cache_dir)
        with locked(cache_dir / LOCK, f"fetches {cache_dir.name}"):
            current = current_snapshot(cache_dir)
            if current and (current != found or not refresh):  # fetched by another process while this one waited
                return current
            if (failed := _failure(cache_dir)) and failed != failed_before:
                raise failed.as_error()
            with _noting_failure(cache_dir):
                return _new_copy(cache_dir, list_files, current, fetch_files)


@dataclass(frozen=True)
class _Failure:
    """The failure of the last process that fetched; `id` is unique."""

    kind: str
    message: str
    id: str

    def as_error(self) -> StoreError:
        """Return the error for a process that waited for the failed one."""
        return (DiskFull if self.kind == DiskFull.__name__ else StoreError)(self.message)


def _failure(cache_dir: Path) -> _Failure | None:
    """Read the failure of the last fetch; None if it succeeded."""
    try:
        return _Failure(**json.loads((cache_dir / _FAILED).read_text()))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def _noting_failure(cache_dir: Path) -> Iterator[None]:
    """Run the block and write errors of storage or disk into the cache."""
    path = cache_dir / _FAILED
    try:
        yield
    except (StoreRefused, NotFound):
        raise  # a refusal is quick, so every process may ask for itself
    except StoreError as error:
        failure = _Failure(type(error).__name__, str(error), uuid.uuid4().hex)
        with suppress(OSError):  # the disk may be full
            path.write_text(json.dumps(asdict(failure)))
        raise
    path.unlink(missing_ok=True)


def _new_copy(
    cache_dir: Path, list_files: Callable[[], Listing], current: Path | None, fetch_files: _Fetch | None = None
) -> Path:
    """Return an up-to-date copy of the remote; `current` if it is unchanged or the remote cannot be reached."""
    try:
        listing = list_files()
    except StoreError as error:
        if current is None or isinstance(error, StoreRefused | NotFound):
            raise
        log.warning("%s; the copy in %s is used as it is", error, current)
        return current
    if fetch_files:
        return fetch_files(listing)
    if current and current.name == listing.fingerprint:
        return current
    return _make_snapshot(cache_dir, listing, list_files, current)


def _make_snapshot(cache_dir: Path, listing: Listing, list_again: Callable[[], Listing], current: Path | None) -> Path:
    """Fetch a listing into a new snapshot, make it the current one, and return it."""
    snapshot = cache_dir / listing.fingerprint
    partial = cache_dir / f"{listing.fingerprint}.partial"
    for path in cache_dir.iterdir():
        if path.is_dir() and path not in (snapshot, partial, current):
            shutil.rmtree(path)
    if snapshot.exists():  # without a manifest or damaged: reuse its good files
        shutil.rmtree(partial, ignore_errors=True)
        snapshot.rename(partial)
    partial.mkdir(exist_ok=True)
    old = Manifest.read(cache_dir / MANIFEST)
    if current and old:
        for file in listing.files:
            kept = old.files.get(file.name)
            if kept and file.content and (kept.size, kept.content) == (file.size, file.content):
                _link(current / file.name, partial / file.name)
    log.info("fetching %d files of %s into %s", len(listing.files), listing.uri, snapshot)
    sha256 = download_files(listing, partial)
    # Without hashes, ranges of two versions of a file could be combined unnoticed.
    is_checked = all(file.sha256 or file.git_sha1 for file in listing.files)
    if not is_checked and list_again().fingerprint != listing.fingerprint:
        raise StoreError(f"{listing.uri}: was changed while it was copied; run the same command again")
    partial.rename(snapshot)
    manifest_of(listing, sha256, snapshot, snapshot.name).write(cache_dir / MANIFEST)
    return snapshot


def fill_folder(folder: Path, list_files: Callable[[], Listing]) -> None:
    """Fetch the listed files into a user's own folder; a complete folder needs no request.

    Existing files with the remote's bytes stay; files that a sibling folder has are linked. Many processes may call
    this at once, and may be killed.
    Raises: StoreRefused for another file of the same name; the errors of `local_copy`.
    """
    if is_filled(folder):
        return
    listing = list_files()  # before the folder is created, in case the remote refuses
    with translated(str(folder), "be filled"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / FOLDER_LOCK, f"downloads {folder.name}"):
            if not is_filled(folder):
                _fill_missing(folder, listing)


def _fill_missing(folder: Path, listing: Listing) -> None:
    """Fetch the missing files of a folder beside it, and move each into place."""
    ours = Manifest.read(folder / FOLDER_MANIFEST)
    sha256 = {file.name: sha256_if_same(folder / file.name, file) for file in listing.files}
    missing = tuple(file for file in listing.files if not sha256[file.name])
    for file in missing:
        if (folder / file.name).exists() and file.name not in (ours.files if ours else {}):
            raise StoreRefused(
                f"{folder / file.name}: is there, but is not the file of {listing.uri}; delete it or move it away"
            )
    names = {file.name: _partial_name(file) for file in missing}
    partial = folder / _FOLDER_PARTIAL
    partial.mkdir(exist_ok=True)
    for path in partial.iterdir():
        if path.name not in names.values():
            path.unlink()
    _link_siblings(folder, {partial / names[file.name]: file for file in missing})
    sha256 |= download_files(Listing(listing.uri, listing.fs, missing), partial, lambda file: names[file.name])
    for file in missing:
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / names[file.name], folder / file.name)
    manifest_of(listing, sha256, folder, ".").write(folder / FOLDER_MANIFEST)
    shutil.rmtree(partial)


def _partial_name(file: RemoteFile) -> str:
    """Return the name of a partial file. It depends on the content, so another hub with the same file continues it."""
    return hashlib.sha256(f"{file.name} {file.size} {file.content}".encode()).hexdigest()[:16]


def is_filled(folder: Path) -> bool:
    """Return whether a user's own folder has all files that were fetched into it."""
    manifest = Manifest.read(folder / FOLDER_MANIFEST)
    return manifest is not None and manifest.complete_folder(folder) is not None


def cache_dir_of(uri: str, storage_options: Mapping[str, Any]) -> Path:
    """Return the cache folder for an address on a store with these options."""
    client = storage_options.get("client_kwargs") or {}
    endpoint = storage_options.get("endpoint_url") or client.get("endpoint_url") or ""
    digest = hashlib.sha256(f"{uri}\n{endpoint}".encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", public_uri(uri).rstrip("/").rpartition("/")[2])[:60]
    return cache_folder() / "models" / f"{name}-{digest}"


def list_folder(uri: str, storage_options: Mapping[str, Any], folders: Iterable[str], choose: _Choose) -> Listing:
    """List the chosen files of a remote folder and of its subfolders with these names.

    Raises: StoreRefused if it is not a folder or no file is chosen.
    """
    fs, root = open_filesystem(uri, storage_options, num_retries=1)  # `with_retries` tries again
    root = root.rstrip("/")
    entries = _list_entries(fs, uri, root)
    infos = {name: info for name, info in entries.items() if info["type"] == "file"}
    for folder in folders:
        if entries.get(folder, {}).get("type") == "directory":
            inside = _list_entries(fs, f"{uri}/{folder}", f"{root}/{folder}")
            infos |= {f"{folder}/{name}": info for name, info in inside.items() if info["type"] == "file"}
    return _listing_of(uri, fs, infos, choose)


def list_file(
    uri: str, name: str, root_uri: str, storage_options: Mapping[str, Any], folders: Iterable[str], choose: _Choose
) -> Listing:
    """List one remote file, and the chosen files in `folders` of `root_uri`.

    `name`: the path of the file in the folder `root_uri`. That folder itself is not listed: it may be large or private.
    """
    fs, path = open_filesystem(uri, storage_options, num_retries=1)  # `with_retries` tries again
    infos = {name: with_retries(public_uri(uri), "look up", lambda: _look_up(fs, path))}
    root = fs._strip_protocol(root_uri).rstrip("/")
    for folder in folders:
        with suppress(NotFound, StoreRefused):
            inside = _list_entries(fs, f"{root_uri}/{folder}", f"{root}/{folder}")
            infos |= {f"{folder}/{each}": info for each, info in inside.items() if info["type"] == "file"}
    return _listing_of(uri, fs, infos, choose)


def _list_entries(fs: Any, uri: str, path: str) -> dict[str, dict[str, Any]]:
    """Return the entries of a remote folder, by the last part of their names. Raises: NotFound."""
    infos = with_retries(public_uri(uri), "list", lambda: fs.ls(path, detail=True))
    found = {str(info["name"]).rstrip("/").rpartition("/")[2]: info for info in infos}
    if not found:
        raise NotFound(f"{public_uri(uri)}: there is nothing in this folder")
    return found


def _look_up(fs: Any, path: str) -> dict[str, Any]:
    """Return fsspec's info of a remote file. Raises: the server's error, which fsspec hides in FileNotFoundError."""
    try:
        info: dict[str, Any] = fs.info(path)
    except FileNotFoundError as error:
        if error.__cause__ and getattr(error.__cause__, "status", None) != 404:
            raise error.__cause__ from None
        raise
    if info["type"] != "file":
        raise FileNotFoundError(path)
    return info


def _listing_of(uri: str, fs: Any, infos: Mapping[str, Mapping[str, Any]], choose: _Choose) -> Listing:
    """Return a listing of the chosen files. Raises: StoreRefused if there are none."""
    chosen = list(choose(list(infos)))
    if not chosen:
        raise StoreRefused(f"{public_uri(uri)}: none of its {len(infos)} files are needed; is this the right address?")
    files = []
    for name in chosen:
        info = infos[name]
        if info.get("size") is None:  # a listing over HTTP has only names
            info = with_retries(f"{public_uri(uri)}: {name}", "look up", bind(_look_up, fs, info["name"]))
        version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
        files.append(RemoteFile(name=name, path=info["name"], size=info.get("size"), version=version))
    return Listing(public_uri(uri), fs, tuple(files))


def current_snapshot(cache_dir: Path) -> Path | None:
    """Return the current snapshot of a folder in the cache; None if there is none, or a file is missing."""
    manifest = Manifest.read(cache_dir / MANIFEST)
    return manifest.complete_folder(cache_dir) if manifest else None


def manifest_of(listing: Listing, sha256: Mapping[str, str], folder: Path, snapshot: str) -> Manifest:
    """Return the manifest of a folder into which a listing was fetched."""
    files = {}
    for file in listing.files:
        size = (folder / file.name).stat().st_size
        files[file.name] = KeptFile(size, file.content, sha256[file.name])
    return Manifest(listing.uri, snapshot, files)


def _link_siblings(folder: Path, wanted: Mapping[Path, RemoteFile]) -> None:
    """Link files that a sibling folder has: FLUX.1-dev and -schnell share 10 GB."""
    known = {}
    for path in folder.parent.glob(f"*/{FOLDER_MANIFEST}"):
        if manifest := Manifest.read(path):
            known.update({kept.sha256: path.parent / name for name, kept in manifest.files.items()})
    for target, file in wanted.items():
        if file.sha256 in known and sha256_if_same(known[file.sha256], file):
            _link(known[file.sha256], target)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file if the disk allows it; otherwise the transfer fetches the file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        target.unlink(missing_ok=True)
        os.link(source, target)


def file_names(folder: Path) -> list[str]:
    """Return the paths of all files in a folder, relative to it."""
    return [path.relative_to(folder).as_posix() for path in folder.glob("**/*") if path.is_file()]


def size_of(path: Path) -> int | None:
    """Return the size of a file in bytes; None if it does not exist."""
    return path.stat().st_size if path.is_file() else None


def cache_folder() -> Path:
    """Return the cache folder of this package: FLUX_BATCH_CACHE, else `flux-batch` in the user's cache folder."""
    if own := os.environ.get("FLUX_BATCH_CACHE"):
        return Path(own).expanduser()
    users = os.environ.get("XDG_CACHE_HOME")
    return (Path(users) if users else Path.home() / ".cache") / "flux-batch"


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Run the block while this process holds the lock file; log a wait with `what` the holder does."""
    from filelock import FileLock, Timeout

    lock, is_logged = FileLock(path), False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=WARN_AFTER_S)
        except Timeout:
            LOADING.beat()  # waiting is progress: the watchdog of the other process sees if that hangs
            if not is_logged:
                log.info("waiting for the process that %s", what)
            is_logged = True
    try:
        yield
    finally:
        lock.release()
