"""Downloads of remote files: whole, in order, checked, and resumed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import fsspec
import pytest

from flux_batch.download import transfer
from flux_batch.download.transfer import Listing, RemoteFile, download_files, sha256_if_same
from flux_batch.errors import DiskFull, StoreError, StoreRefused
from flux_batch.storage.filesystem import open_filesystem
from helpers.hub_server import Hub

SIZES = {"a.bin": 1_000_003, "folder/b.bin": 65_536, "folder/empty.json": 0, "one.json": 1}
FILES = {name: os.urandom(size) for name, size in SIZES.items()}
NAME = "owner/model"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 65_536)


@pytest.fixture(params=["memory", "http"])
def listing(request: pytest.FixtureRequest) -> Listing:
    """The files, in fsspec's memory and behind HTTP."""
    if request.param == "memory":
        fs = fsspec.filesystem("memory")
        root = f"/transfer-{id(request)}"
        for name, data in FILES.items():
            fs.pipe_file(f"{root}/{name}", data)
        return remote(fs, root)
    hub: Hub = request.getfixturevalue("hub")
    return served(hub)


def served(hub: Hub) -> Listing:
    hub.repositories[NAME] = dict(FILES)
    root = f"{hub.endpoint}/{NAME}/resolve/main"
    fs, _ = open_filesystem(root, {})
    return remote(fs, root)


def remote(fs: Any, root: str, **facts: Any) -> Listing:
    files = [RemoteFile(name=name, path=f"{root}/{name}", size=len(FILES[name]), **facts) for name in FILES]
    return Listing("test://place", fs, tuple(files))


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_worker_that_downloads_is_alive(listing: Listing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[str] = []
    monkeypatch.setattr(transfer.LOADING, "beat", lambda: beats.append("alive"))
    download_files(listing, tmp_path)
    assert len(beats) >= sum(-(-size // 65_536) for size in SIZES.values())


def test_files_come_whole_with_their_hashes(listing: Listing, tmp_path: Path) -> None:
    hashes = download_files(listing, tmp_path)
    assert read(tmp_path) == FILES
    assert hashes == {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


@pytest.mark.parametrize("length", [0, 1, 65_536, 65_537, 1_000_002, 1_000_003])
def test_a_prefix_is_not_read_again(hub: Hub, tmp_path: Path, length: int) -> None:
    listing = served(hub)
    (tmp_path / "a.bin").write_bytes(FILES["a.bin"][:length])
    hashes = download_files(listing, tmp_path)
    assert read(tmp_path) == FILES
    assert hashes["a.bin"] == hashlib.sha256(FILES["a.bin"]).hexdigest()
    starts = [int(each.headers["Range"].removeprefix("bytes=").partition("-")[0]) for each in hub.gets("a.bin")]
    assert min(starts, default=length) == length
    assert len(starts) == -(-(1_000_003 - length) // 65_536)


def test_a_local_file_longer_than_the_remote_one_is_fetched_again(listing: Listing, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_bytes(b"too long")
    download_files(listing, tmp_path)
    assert read(tmp_path) == FILES


@pytest.mark.parametrize("fact", ["sha256", "git_sha1"])
def test_a_damaged_file_is_not_kept(hub: Hub, tmp_path: Path, fact: str) -> None:
    data = FILES["a.bin"]
    digest = {"sha256": hashlib.sha256(data), "git_sha1": hashlib.sha1(b"blob %d\0" % len(data) + data)}[fact]
    (file, *_) = served(hub).files
    good = RemoteFile(name=file.name, path=file.path, size=file.size, **{fact: digest.hexdigest()})
    listing = Listing("test://place", served(hub).fs, (good,))
    hub.damaged = {"a.bin"}
    with pytest.raises(StoreError, match=r"test://place: a\.bin arrived damaged: .*run the same command again"):
        download_files(listing, tmp_path)
    assert read(tmp_path) == {}
    hub.damaged = set()
    download_files(listing, tmp_path)
    assert sha256_if_same(tmp_path / "a.bin", good) == hashlib.sha256(data).hexdigest()


def test_a_wrong_prefix_is_found_out_by_the_hash(hub: Hub, tmp_path: Path) -> None:
    listing = served(hub)
    good = RemoteFile(
        name="a.bin", path=listing.files[0].path, size=1_000_003, sha256=hashlib.sha256(FILES["a.bin"]).hexdigest()
    )
    (tmp_path / "a.bin").write_bytes(b"of another file")
    with pytest.raises(StoreError, match="arrived damaged"):
        download_files(Listing("test://place", listing.fs, (good,)), tmp_path)
    download_files(Listing("test://place", listing.fs, (good,)), tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == FILES["a.bin"]


def test_answers_that_break_off_are_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    listing = served(hub)
    hub.breaks = 2
    download_files(listing, tmp_path)
    assert read(tmp_path) == FILES


def test_a_server_without_ranges_is_read_in_one_stream(hub: Hub, tmp_path: Path) -> None:
    listing = served(hub)
    hub.has_ranges = False
    download_files(listing, tmp_path)
    assert read(tmp_path) == FILES


def test_a_prefix_from_a_server_without_ranges_is_kept(hub: Hub, tmp_path: Path) -> None:
    listing = served(hub)
    hub.has_ranges = False
    (tmp_path / "a.bin").write_bytes(FILES["a.bin"][:123_457])
    download_files(listing, tmp_path)
    assert read(tmp_path) == FILES


def test_a_file_of_unknown_size_is_read_to_its_end(hub: Hub, tmp_path: Path) -> None:
    (file, *_) = served(hub).files
    listing = Listing("test://place", served(hub).fs, (RemoteFile(name="a.bin", path=file.path),))
    (tmp_path / "a.bin").write_bytes(b"nobody knows of what")
    download_files(listing, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == FILES["a.bin"]


def test_a_remote_that_stays_away_is_an_error_and_its_prefix_stays(hub: Hub, tmp_path: Path) -> None:
    listing = served(hub)
    (tmp_path / "a.bin").write_bytes(FILES["a.bin"][:100_000])
    hub.statuses = [503] * 1000
    with pytest.raises(StoreError, match=r"test://place: a\.bin: cannot read") as caught:
        download_files(listing, tmp_path)
    assert caught.value.exit_code == 75
    assert (tmp_path / "a.bin").read_bytes() == FILES["a.bin"][:100_000]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_not_tried_again(hub: Hub, tmp_path: Path, status: int) -> None:
    (file, *_) = served(hub).files
    listing = Listing("test://place", served(hub).fs, (RemoteFile(name="one", path=file.path, size=1),))
    hub.statuses = [status] * 1000
    with pytest.raises(StoreRefused, match="cannot read"):
        download_files(listing, tmp_path)
    assert len(hub.requests) == 1


def test_a_disk_that_is_too_small_is_said_before_anything_is_read(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    listing = served(hub)
    need = sum(SIZES.values()) + transfer.SPARE_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, need - 1))
    with pytest.raises(
        DiskFull, match=r"needs 1\.1 MB more and 268\.4 MB to spare; 269\.5 MB are free .*FLUX_BATCH_CACHE"
    ):
        download_files(listing, tmp_path)
    assert hub.requests == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, need))
    download_files(listing, tmp_path)


def test_a_fingerprint_follows_what_the_remote_tells() -> None:
    fs = fsspec.filesystem("memory")

    def fingerprint(**facts: Any) -> str:
        return remote(fs, "/x", **facts).fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(version="1"), fingerprint(version="2"), fingerprint(sha256="2a")}) == 4
    files = remote(fs, "/x", version="1").files
    assert Listing("u", fs, files).fingerprint == Listing("v", fs, files[::-1]).fingerprint
    assert Listing("u", fs, files).fingerprint != Listing("u", fs, files[1:]).fingerprint
