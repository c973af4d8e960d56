"""Copies of remote folders on this machine: made once, by one process, whole or not at all; knows no model.

In the cache, a place of its own for each remote folder:

    manifest.json           names the snapshot and its files with size and sha256; written last, replaced whole
    3f2a91c04b7de815/       the snapshot, named after the listing it was made from; never changed
    3f2a91c04b7de815.partial/   of a transfer that goes on, or was killed and will be gone on with

A copy that is there is used without asking the remote anything, however old it is: a warm cache touches no network.
`refresh` compares it with the remote's listing first and fetches what changed into a new snapshot; what is the same is
linked. The snapshot before it stays, since other processes may be reading it; older ones go. A remote that cannot be
reached then costs a warning, not the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any

from flux_batch.download.transfer import Listing, RemoteFile, fetch, sha256_if_same
from flux_batch.errors import NotFound, StoreError, StoreRefused
from flux_batch.redaction import public_uri
from flux_batch.storage.errors import translated
from flux_batch.storage.retry import with_retries
from flux_batch.storage.store import open_filesystem

MANIFEST = "manifest.json"
# What file systems call the thing that changes with the bytes.
VERSION_KEYS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "Last-Modified", "created")
# Names of our own in a folder that belongs to the user.
LOCK = ".lock"
FOLDER_MANIFEST, FOLDER_LOCK, FOLDER_PARTIAL = ".flux-batch.json", ".flux-batch.lock", ".flux-batch-partial"

# Two processes that start together differ by less; whoever waits longer should see why.
WARN_AFTER_S = 5.0

log = logging.getLogger(__name__)

Choose = Callable[[list[str]], Iterable[str]]
Fetch = Callable[[Listing], Path]


@dataclass(frozen=True)
class KeptFile:
    """What is known of a file that was fetched; `content` is what the remote called its bytes."""

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
        """Read a manifest; None if there is none that can be read."""
        try:
            tree = json.loads(path.read_text())
            files = {name: KeptFile(**facts) for name, facts in tree["files"].items()}
            return cls(tree["uri"], tree["snapshot"], files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, path: Path) -> None:
        """Write it in one step."""
        scratch = path.with_name(f".{path.name}.new")
        scratch.write_text(json.dumps(asdict(self), indent=1))
        os.replace(scratch, path)

    def whole(self, home: Path) -> Path | None:
        """Return the folder if every file is there in its size."""
        folder = home / self.snapshot
        is_whole = all(size_of(folder / name) == kept.size for name, kept in self.files.items())
        return folder if is_whole else None


def local_copy(
    place: Path, list_files: Callable[[], Listing], *, fetch_files: Fetch | None = None, refresh: bool = False
) -> Path:
    """Return the folder that holds the files listed, fetching them first if they are not there.

    `fetch_files`: fetches a listing, writes the manifest in `place` and returns the folder; if not by a snapshot there.
    Safe in many processes at once, of which one fetches, and whenever one is killed: the next goes on.
    Raises: StoreError for a remote that cannot be reached, StoreRefused for one that says no, or a full disk.
    """
    found = current_snapshot(place)
    if found and not refresh:
        return found
    with translated(str(place), "keep a copy (FLUX_BATCH_CACHE names another place)"):
        place.mkdir(parents=True, exist_ok=True)
        with locked(place / LOCK, f"fetches {place.name}"):
            current = current_snapshot(place)
            if current and (current != found or not refresh):  # brought by another process, while this one waited
                return current
            return new_copy(place, list_files, current, fetch_files)


def new_copy(
    place: Path, list_files: Callable[[], Listing], current: Path | None, fetch_files: Fetch | None = None
) -> Path:
    """Return a copy of what the remote holds now: a new one, or `current`, if that is the same or all there is."""
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
    return make_snapshot(place, listing, list_files, current)


def make_snapshot(place: Path, listing: Listing, list_again: Callable[[], Listing], current: Path | None) -> Path:
    """Fetch a listing into a new snapshot and make it the one that is used."""
    snapshot = place / listing.fingerprint
    partial = place / f"{listing.fingerprint}.partial"
    for path in place.iterdir():
        if path.is_dir() and path not in (snapshot, partial, current):
            shutil.rmtree(path)
    if snapshot.exists():  # without a manifest, or damaged since: whatever is good of it need not be read again
        shutil.rmtree(partial, ignore_errors=True)
        snapshot.rename(partial)
    partial.mkdir(exist_ok=True)
    old = Manifest.read(place / MANIFEST)
    if current and old:
        for file in listing.files:
            kept = old.files.get(file.name)
            if kept and file.content and (kept.size, kept.content) == (file.size, file.content):
                link(current / file.name, partial / file.name)
    log.info("fetching %d files of %s into %s", len(listing.files), listing.uri, snapshot)
    sha256 = fetch(listing, partial)
    # Without hashes to check, ranges of two versions of a file would look like a whole one.
    is_checked = all(file.sha256 or file.git_sha1 for file in listing.files)
    if not is_checked and list_again().fingerprint != listing.fingerprint:
        raise StoreError(f"{listing.uri}: was changed while it was copied; run the same command again")
    partial.rename(snapshot)
    manifest_of(listing, sha256, snapshot, snapshot.name).write(place / MANIFEST)
    return snapshot


def fill_folder(folder: Path, list_files: Callable[[], Listing]) -> None:
    """Bring the files listed into a folder of the user's; nothing is asked of the remote if this was done before.

    Files that are there and known to be the remote's stay; so do those that another folder beside this one has, which
    are linked. Safe in many processes at once and whenever one is killed.
    Raises: StoreRefused for a file of that name that is another; and what `local_copy` raises.
    """
    if is_filled(folder):
        return
    listing = list_files()  # first: a remote that says no leaves no folder behind
    with translated(str(folder), "be filled"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / FOLDER_LOCK, f"downloads {folder.name}"):
            if not is_filled(folder):
                fill(folder, listing)


def fill(folder: Path, listing: Listing) -> None:
    """Fetch what a folder has not, beside it, and put each file in place."""
    ours = Manifest.read(folder / FOLDER_MANIFEST)
    sha256 = {file.name: sha256_if_same(folder / file.name, file) for file in listing.files}
    missing = tuple(file for file in listing.files if not sha256[file.name])
    for file in missing:
        if (folder / file.name).exists() and file.name not in (ours.files if ours else {}):
            raise StoreRefused(
                f"{folder / file.name}: is there, but is not the file of {listing.uri}; delete it or move it away"
            )
    names = {file.name: partial_name(file) for file in missing}
    partial = folder / FOLDER_PARTIAL
    partial.mkdir(exist_ok=True)
    for path in partial.iterdir():
        if path.name not in names.values():
            path.unlink()
    link_siblings(folder, {partial / names[file.name]: file for file in missing})
    sha256 |= fetch(Listing(listing.uri, listing.fs, missing), partial, lambda file: names[file.name])
    for file in missing:
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / names[file.name], folder / file.name)
    manifest_of(listing, sha256, folder, ".").write(folder / FOLDER_MANIFEST)
    shutil.rmtree(partial)


def partial_name(file: RemoteFile) -> str:
    """Return a name for what has come of a file, told by its bytes: another hub with the same goes on with it."""
    return hashlib.sha256(f"{file.name} {file.size} {file.content}".encode()).hexdigest()[:16]


def is_filled(folder: Path) -> bool:
    """Tell whether everything that was fetched into a folder of the user's is there."""
    manifest = Manifest.read(folder / FOLDER_MANIFEST)
    return manifest is not None and manifest.whole(folder) is not None


def cache_dir_of(uri: str, storage_options: Mapping[str, Any]) -> Path:
    """Return the place in the cache for an address on the store that the options name."""
    client = storage_options.get("client_kwargs") or {}
    endpoint = storage_options.get("endpoint_url") or client.get("endpoint_url") or ""
    digest = hashlib.sha256(f"{uri}\n{endpoint}".encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", public_uri(uri).rstrip("/").rpartition("/")[2])[:60]
    return cache_folder() / "models" / f"{name}-{digest}"


def list_folder(uri: str, storage_options: Mapping[str, Any], folders: Iterable[str], choose: Choose) -> Listing:
    """List the files chosen of those in a remote folder and in its folders of these names; nothing deeper.

    Raises: StoreRefused if it is no folder or nothing is chosen.
    """
    fs, root = open_filesystem(uri, storage_options)
    root = root.rstrip("/")
    entries = list_entries(fs, uri, root)
    infos = {name: info for name, info in entries.items() if info["type"] == "file"}
    for folder in folders:
        if entries.get(folder, {}).get("type") == "directory":
            inside = list_entries(fs, f"{uri}/{folder}", f"{root}/{folder}")
            infos |= {f"{folder}/{name}": info for name, info in inside.items() if info["type"] == "file"}
    return listing_of(uri, fs, infos, choose)


def list_file(
    uri: str, name: str, root_uri: str, storage_options: Mapping[str, Any], folders: Iterable[str], choose: Choose
) -> Listing:
    """List one remote file, called `name` from the folder `root_uri`, and what is chosen of that folder's folders.

    The folder itself is not listed: it may hold anything, or be closed to whoever may read the file.
    """
    fs, path = open_filesystem(uri, storage_options)
    infos = {name: with_retries(public_uri(uri), "look up", lambda: look_up(fs, path))}
    root = fs._strip_protocol(root_uri).rstrip("/")
    for folder in folders:
        with suppress(NotFound, StoreRefused):
            inside = list_entries(fs, f"{root_uri}/{folder}", f"{root}/{folder}")
            infos |= {f"{folder}/{each}": info for each, info in inside.items() if info["type"] == "file"}
    return listing_of(uri, fs, infos, choose)


def list_entries(fs: Any, uri: str, path: str) -> dict[str, dict[str, Any]]:
    """Return what lies directly in a remote folder, by its last name. Raises: NotFound."""
    infos = with_retries(public_uri(uri), "list", lambda: fs.ls(path, detail=True))
    found = {str(info["name"]).rstrip("/").rpartition("/")[2]: info for info in infos}
    if not found:
        raise NotFound(f"{public_uri(uri)}: there is nothing in this folder")
    return found


def look_up(fs: Any, path: str) -> dict[str, Any]:
    """Return what the file system says of a file. Raises: what it met, which fsspec's HTTP calls not found."""
    try:
        info: dict[str, Any] = fs.info(path)
    except FileNotFoundError as error:
        if error.__cause__ and getattr(error.__cause__, "status", None) != 404:
            raise error.__cause__ from None
        raise
    if info["type"] != "file":
        raise FileNotFoundError(path)
    return info


def listing_of(uri: str, fs: Any, infos: Mapping[str, Mapping[str, Any]], choose: Choose) -> Listing:
    """Make the listing of the files chosen. Raises: StoreRefused if there are none."""
    chosen = list(choose(list(infos)))
    if not chosen:
        raise StoreRefused(f"{public_uri(uri)}: none of its {len(infos)} files are needed; is this the right address?")
    files = []
    for name in chosen:
        info = infos[name]
        if info.get("size") is None:  # a listing over HTTP gives names alone
            info = with_retries(f"{public_uri(uri)}: {name}", "look up", bind(look_up, fs, info["name"]))
        version = next((str(info[key]) for key in VERSION_KEYS if info.get(key)), "")
        files.append(RemoteFile(name=name, path=info["name"], size=info.get("size"), version=version))
    return Listing(public_uri(uri), fs, tuple(files))


def current_snapshot(place: Path) -> Path | None:
    """Return the snapshot in use of a place in the cache, if it is whole."""
    manifest = Manifest.read(place / MANIFEST)
    return manifest.whole(place) if manifest else None


def manifest_of(listing: Listing, sha256: Mapping[str, str], folder: Path, snapshot: str) -> Manifest:
    """Describe what was fetched into a folder."""
    files = {}
    for file in listing.files:
        size = (folder / file.name).stat().st_size
        files[file.name] = KeptFile(size, file.content, sha256[file.name])
    return Manifest(listing.uri, snapshot, files)


def link_siblings(folder: Path, wanted: Mapping[Path, RemoteFile]) -> None:
    """Link to their places the files that a folder beside this one was given: FLUX.1-dev and -schnell share 10 GB."""
    known = {}
    for path in folder.parent.glob(f"*/{FOLDER_MANIFEST}"):
        if manifest := Manifest.read(path):
            known.update({kept.sha256: path.parent / name for name, kept in manifest.files.items()})
    for target, file in wanted.items():
        if file.sha256 in known and sha256_if_same(known[file.sha256], file):
            link(known[file.sha256], target)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, where the disk can; the transfer reads what it could not."""
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
    """Return where this package may keep files: FLUX_BATCH_CACHE, else `flux-batch` in the user's cache."""
    if own := os.environ.get("FLUX_BATCH_CACHE"):
        return Path(own).expanduser()
    users = os.environ.get("XDG_CACHE_HOME")
    return (Path(users) if users else Path.home() / ".cache") / "flux-batch"


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file, as the only process of this machine; its death frees it. `what` is named if it has to wait."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=WARN_AFTER_S)
    except Timeout:
        log.info("waiting for the process that %s", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
