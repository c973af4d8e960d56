"""Copies of remote folders on this machine: made once, by one process, whole or not at all; knows no model.

Each remote folder has a folder of its own in the cache:

    manifest.json           names the snapshot and its files with size and sha256; written last, replaced whole
    3f2a91c04b7de815/           the snapshot, named after its listing; never changed
    failed.json             why the last transfer ended early, for those who waited for it
    3f2a91c04b7de815.partial/   a transfer that is not finished; the next process continues it

A copy is used without a request to the remote, however old it is: a warm cache needs no network. `refresh` compares it
with the listing of the remote and fetches the changed files into a new snapshot, which links the others. The snapshot
before stays, since other processes may read it; older ones are removed. If the remote cannot be reached then, a warning
says so and the copy is used.
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
# Names that file systems have for a value that changes with the bytes.
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "Last-Modified", "created")
# Our files in a folder that belongs to the user.
LOCK = ".lock"
_FAILED = "failed.json"
FOLDER_MANIFEST, FOLDER_LOCK, _FOLDER_PARTIAL = ".flux-batch.json", ".flux-batch.lock", ".flux-batch-partial"

# Longer than two processes that start together wait for each other.
WARN_AFTER_S = 5.0

log = logging.getLogger(__name__)

_Choose = Callable[[list[str]], Iterable[str]]
_Fetch = Callable[[Listing], Path]


@dataclass(frozen=True)
class KeptFile:
    """The facts of a file that was fetched; `content` is the remote's name for its bytes."""

    size: int
    content: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a copy and the address they came from.

    `snapshot`: the copy's folder, relative to that of the manifest, or absolute.
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
        """Write the manifest in one step."""
        scratch = path.with_name(f".{path.name}.new")
        scratch.write_text(json.dumps(asdict(self), indent=1))
        os.replace(scratch, path)

    def complete_folder(self, manifest_folder: Path) -> Path | None:
        """Return the folder if every file has its size; else None."""
        folder = manifest_folder / self.snapshot
        is_whole = all(size_of(folder / name) == kept.size for name, kept in self.files.items())
        return folder if is_whole else None


def local_copy(
    cache_dir: Path, list_files: Callable[[], Listing], *, fetch_files: _Fetch | None = None, refresh: bool = False
) -> Path:
    """Return the folder that holds the listed files, fetching them first if need be.

    `fetch_files`: fetches a listing, writes the manifest and returns the folder; without it, a snapshot is made here.
    Many processes may call this at once: one fetches, and if it is killed, the next continues.
    Those who waited for one that fails fail with it: the remote is asked by one process of a machine, and not by each.
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
            if current and (current != found or not refresh):  # brought by another process, while this one waited
                return current
            if (failed := _failure(cache_dir)) and failed != failed_before:
                raise failed.as_error()
            with _noting_failure(cache_dir):
                return _new_copy(cache_dir, list_files, current, fetch_files)


@dataclass(frozen=True)
class _Failure:
    """The failure of the process that has fetched last; `id` is another for each."""

    kind: str
    message: str
    id: str

    def as_error(self) -> StoreError:
        """Return the error for a process that has waited for the one that failed."""
        return (DiskFull if self.kind == DiskFull.__name__ else StoreError)(self.message)


def _failure(cache_dir: Path) -> _Failure | None:
    """Read how the last fetch failed; None if it did not."""
    try:
        return _Failure(**json.loads((cache_dir / _FAILED).read_text()))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def _noting_failure(cache_dir: Path) -> Iterator[None]:
    """Run the block, and note in the cache why storage or disk failed."""
    path = cache_dir / _FAILED
    try:
        yield
    except (StoreRefused, NotFound):
        raise  # an answer, which every process may have for itself
    except StoreError as error:
        failure = _Failure(type(error).__name__, str(error), uuid.uuid4().hex)
        with suppress(OSError):  # a full disk
            path.write_text(json.dumps(asdict(failure)))
        raise
    path.unlink(missing_ok=True)


def _new_copy(
    cache_dir: Path, list_files: Callable[[], Listing], current: Path | None, fetch_files: _Fetch | None = None
) -> Path:
    """Return a copy of the remote as it is now; `current` if it is the same or the remote cannot be reached."""
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
    if snapshot.exists():  # without a manifest, or damaged: its good files are not fetched again
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
    # Without hashes, ranges of two versions of a file would pass for a whole one.
    is_checked = all(file.sha256 or file.git_sha1 for file in listing.files)
    if not is_checked and list_again().fingerprint != listing.fingerprint:
        raise StoreError(f"{listing.uri}: was changed while it was copied; run the same command again")
    partial.rename(snapshot)
    manifest_of(listing, sha256, snapshot, snapshot.name).write(cache_dir / MANIFEST)
    return snapshot


def fill_folder(folder: Path, list_files: Callable[[], Listing]) -> None:
    """Fetch the files listed into a folder of the user's; a complete folder needs no request.

    Files that are there with the remote's bytes stay; files that a folder beside this one has are linked. Many
    processes may call this at once, and be killed.
    Raises: StoreRefused for another file of the same name; and as `local_copy`.
    """
    if is_filled(folder):
        return
    listing = list_files()  # first, so that a remote that refuses leaves no folder behind
    with translated(str(folder), "be filled"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / FOLDER_LOCK, f"downloads {folder.name}"):
            if not is_filled(folder):
                _fill_missing(folder, listing)


def _fill_missing(folder: Path, listing: Listing) -> None:
    """Fetch the missing files of a folder beside it, and move each into it."""
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
    """Return the name of a partial file, which follows from its bytes: another hub with the same file continues it."""
    return hashlib.sha256(f"{file.name} {file.size} {file.content}".encode()).hexdigest()[:16]


def is_filled(folder: Path) -> bool:
    """Return whether a folder of the user's has all files that were fetched into it."""
    manifest = Manifest.read(folder / FOLDER_MANIFEST)
    return manifest is not None and manifest.complete_folder(folder) is not None


def cache_dir_of(uri: str, storage_options: Mapping[str, Any]) -> Path:
    """Return the folder in the cache for an address on the store of these options."""
    client = storage_options.get("client_kwargs") or {}
    endpoint = storage_options.get("endpoint_url") or client.get("endpoint_url") or ""
    digest = hashlib.sha256(f"{uri}\n{endpoint}".encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", public_uri(uri).rstrip("/").rpartition("/")[2])[:60]
    return cache_folder() / "models" / f"{name}-{digest}"


def list_folder(uri: str, storage_options: Mapping[str, Any], folders: Iterable[str], choose: _Choose) -> Listing:
    """List the chosen files of a remote folder, and of its folders with these names.

    Raises: StoreRefused if it is no folder or no file is chosen.
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

    `name`: the path of the file in the folder `root_uri`, which is not listed: it may hold anything, or be closed.
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
    """Return the entries of a remote folder, by the last part of their name. Raises: NotFound."""
    infos = with_retries(public_uri(uri), "list", lambda: fs.ls(path, detail=True))
    found = {str(info["name"]).rstrip("/").rpartition("/")[2]: info for info in infos}
    if not found:
        raise NotFound(f"{public_uri(uri)}: there is nothing in this folder")
    return found


def _look_up(fs: Any, path: str) -> dict[str, Any]:
    """Return the facts of a remote file. Raises: the server's error, which fsspec hides behind FileNotFoundError."""
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
    """Return a listing of the files chosen. Raises: StoreRefused if there are none."""
    chosen = list(choose(list(infos)))
    if not chosen:
        raise StoreRefused(f"{public_uri(uri)}: none of its {len(infos)} files are needed; is this the right address?")
    files = []
    for name in chosen:
        info = infos[name]
        if info.get("size") is None:  # a listing over HTTP gives names alone
            info = with_retries(f"{public_uri(uri)}: {name}", "look up", bind(_look_up, fs, info["name"]))
        version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
        files.append(RemoteFile(name=name, path=info["name"], size=info.get("size"), version=version))
    return Listing(public_uri(uri), fs, tuple(files))


def current_snapshot(cache_dir: Path) -> Path | None:
    """Return the current snapshot of a folder in the cache; None if there is none, or a file is missing."""
    manifest = Manifest.read(cache_dir / MANIFEST)
    return manifest.complete_folder(cache_dir) if manifest else None


def manifest_of(listing: Listing, sha256: Mapping[str, str], folder: Path, snapshot: str) -> Manifest:
    """Return the manifest of a folder that a listing was fetched into."""
    files = {}
    for file in listing.files:
        size = (folder / file.name).stat().st_size
        files[file.name] = KeptFile(size, file.content, sha256[file.name])
    return Manifest(listing.uri, snapshot, files)


def _link_siblings(folder: Path, wanted: Mapping[Path, RemoteFile]) -> None:
    """Link files that a folder beside this one has: FLUX.1-dev and -schnell share 10 GB."""
    known = {}
    for path in folder.parent.glob(f"*/{FOLDER_MANIFEST}"):
        if manifest := Manifest.read(path):
            known.update({kept.sha256: path.parent / name for name, kept in manifest.files.items()})
    for target, file in wanted.items():
        if file.sha256 in known and sha256_if_same(known[file.sha256], file):
            _link(known[file.sha256], target)


def _link(source: Path, target: Path) -> None:
    """Link a file, if the disk can; the transfer fetches it otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        target.unlink(missing_ok=True)
        os.link(source, target)


def file_names(folder: Path) -> list[str]:
    """Return the paths of all files in a folder, relative to it."""
    return [path.relative_to(folder).as_posix() for path in folder.glob("**/*") if path.is_file()]


def size_of(path: Path) -> int | None:
    """Return the size of a file in bytes; None if there is none."""
    return path.stat().st_size if path.is_file() else None


def cache_folder() -> Path:
    """Return the cache folder of this package: FLUX_BATCH_CACHE, else `flux-batch` in the user's cache."""
    if own := os.environ.get("FLUX_BATCH_CACHE"):
        return Path(own).expanduser()
    users = os.environ.get("XDG_CACHE_HOME")
    return (Path(users) if users else Path.home() / ".cache") / "flux-batch"


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Run the block as the only process that holds the lock file; a wait is logged with `what` the holder does."""
    from filelock import FileLock, Timeout

    lock, is_logged = FileLock(path), False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=WARN_AFTER_S)
        except Timeout:
            LOADING.beat()  # whether the other one hangs is seen by whoever watches that
            if not is_logged:
                log.info("waiting for the process that %s", what)
            is_logged = True
    try:
        yield
    finally:
        lock.release()
