"""Copies of remote folders: made once per machine, whole or not at all even after kills, and then kept."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs

from flux_batch.download import local_copy as module
from flux_batch.download import transfer
from flux_batch.download.local_copy import (
    FOLDER_MANIFEST,
    MANIFEST,
    Listing,
    cache_dir_of,
    fill_folder,
    list_file,
    list_folder,
    local_copy,
)
from flux_batch.download.transfer import RemoteFile
from flux_batch.errors import NotFound, StoreError, StoreRefused
from flux_batch.storage import retry
from helpers.counting_proxy import Proxy, counting_proxy
from helpers.s3 import S3Server
from helpers.waiting import PATIENCE_S, wait_until

FILES = {
    "index.json": b"{}",
    "vae/config.json": b'{"a": 1}',
    "vae/model.safetensors": os.urandom(300_001),
    "top.safetensors": os.urandom(500_003),
}
CLUTTER = {"image.jpg": b"x", "vae/deeper/model.safetensors": b"y", "other/model.safetensors": b"z"}
# So small that the test files have as many ranges as large files.
CHUNK = 65_536


@pytest.fixture(autouse=True)
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(retry, "ATTEMPTS", 2)
    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path / "cache"))


class Remote:
    """A remote folder that a test changes, and its local copy."""

    def __init__(self, uri: str, options: dict[str, Any]) -> None:
        self.uri, self.options = uri, options
        self.fs, self.root = fsspec.url_to_fs(uri, **options)
        self.num_listings = 0

    def put(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            self.fs.pipe_file(f"{self.root}/{name}", data)

    def listing(self) -> Listing:
        self.num_listings += 1
        return list_folder(self.uri, self.options, ["vae", "not-there"], choose)

    def copy(self, **options: bool) -> Path:
        return local_copy(cache_dir_of(self.uri, self.options), self.listing, **options)


def choose(names: list[str]) -> list[str]:
    return [name for name in sorted(names) if not name.endswith(".jpg")]


@pytest.fixture
def remote() -> Remote:
    place = Remote(f"memory://{uuid.uuid4().hex}/model", {})
    place.put(FILES | CLUTTER)
    return place


@pytest.fixture
def proxy(moto: S3Server) -> Iterator[Proxy]:
    with counting_proxy(moto.endpoint_url) as server:
        yield server


@pytest.fixture
def bucket(moto: S3Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """The same folder in a bucket, behind a counting proxy."""
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    uri = f"{moto.make_bucket()}/some/model"
    Remote(uri, moto.storage_options).put(FILES | CLUTTER)
    no_patience = {"config_kwargs": {"retries": {"max_attempts": 1}}}
    return Remote(uri, moto.storage_options | {"endpoint_url": proxy.endpoint_url} | no_patience)


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestLocalCopy:
    def test_a_copy_holds_the_chosen_files_and_a_manifest(self, remote: Remote) -> None:
        folder = remote.copy()
        assert read(folder) == FILES
        manifest = json.loads((folder.parent / MANIFEST).read_text())
        assert manifest["uri"] == remote.uri
        kept = manifest["files"]["vae/model.safetensors"]
        assert kept["size"] == 300_001
        assert kept["sha256"] == hashlib.sha256(FILES["vae/model.safetensors"]).hexdigest()

    def test_is_used_without_asking(self, remote: Remote) -> None:
        folder = remote.copy()
        remote.put({"index.json": b"changed"})
        num_listings = remote.num_listings
        assert remote.copy() == folder
        assert remote.num_listings == num_listings
        remote.fs.rm(remote.root, recursive=True)
        assert read(remote.copy()) == FILES

    def test_refresh_keeps_what_has_not_changed(self, remote: Remote) -> None:
        folder = remote.copy()
        num_listings = remote.num_listings
        assert remote.copy(refresh=True) == folder
        assert remote.num_listings == num_listings + 1

    def test_a_change_in_the_middle_is_noticed(self, remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
        real = module.download_files

        def change_and_fetch(listing: Listing, folder: Path) -> dict[str, str]:
            remote.put({"vae/config.json": b'{"a": 2}'})
            return real(listing, folder)

        monkeypatch.setattr(module, "download_files", change_and_fetch)
        with pytest.raises(StoreError, match="was changed while it was copied"):
            remote.copy()
        monkeypatch.setattr(module, "download_files", real)
        assert read(remote.copy())["vae/config.json"] == b'{"a": 2}'

    @pytest.mark.s3
    def test_refresh_fetches_changed_files(self, bucket: Remote, proxy: Proxy) -> None:
        old = bucket.copy()
        bucket.put({"vae/config.json": b'{"a": 2}'})
        proxy.requests.clear()
        new = bucket.copy(refresh=True)
        assert read(new) == FILES | {"vae/config.json": b'{"a": 2}'}
        assert [path.rpartition("/")[2] for path, _ in proxy.gets()] == ["config.json"]
        assert read(old) == FILES  # another process may still read it
        assert bucket.copy() == new

    def test_only_one_older_snapshot_stays(self, remote: Remote) -> None:
        first = remote.copy()
        for number in range(3):
            remote.put({"index.json": b"%d" % number, "vae/config.json": b"%d" % number})
            last = remote.copy(refresh=True)
        assert read(last)["index.json"] == b"2"
        assert not first.exists()
        assert len([path for path in last.parent.iterdir() if path.is_dir()]) == 2

    @pytest.mark.s3
    def test_refresh_of_a_remote_that_is_away_warns(
        self, bucket: Remote, proxy: Proxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = bucket.copy()
        proxy.is_down = True
        assert bucket.copy(refresh=True) == folder
        assert f"{bucket.uri}: cannot list" in caplog.text
        assert "is used as it is" in caplog.text

    def test_refresh_of_a_remote_that_is_gone_is_an_error(self, remote: Remote) -> None:
        remote.copy()
        remote.fs.rm(remote.root, recursive=True)
        with pytest.raises(NotFound):
            remote.copy(refresh=True)

    @pytest.mark.s3
    def test_a_file_that_was_cut_is_fetched_again(self, bucket: Remote, proxy: Proxy) -> None:
        folder = bucket.copy()
        os.truncate(folder / "top.safetensors", 65_536)
        (folder / "index.json").unlink()
        proxy.requests.clear()
        assert read(bucket.copy()) == FILES
        assert {path.rpartition("/")[2] for path, _ in proxy.gets()} == {"top.safetensors", "index.json"}
        assert sum(path.endswith("top.safetensors") for path, _ in proxy.gets()) == 7  # seven of eight ranges

    def test_a_manifest_nobody_can_read_is_none(self, remote: Remote) -> None:
        folder = remote.copy()
        for text in ("", "[]", '{"uri": 1}', '{"uri": "", "snapshot": "x", "files": {"a": {}}}'):
            (folder.parent / MANIFEST).write_text(text)
            assert remote.copy() == folder
        assert read(folder) == FILES

    def test_a_warm_cache_may_be_read_only(self, remote: Remote) -> None:
        folder = remote.copy()
        (folder.parent / ".lock").unlink()
        before = sorted(folder.parent.iterdir())
        remote.copy()
        assert sorted(folder.parent.iterdir()) == before

    def test_different_stores_have_different_places(self) -> None:
        one, two = {"endpoint_url": "http://one"}, {"client_kwargs": {"endpoint_url": "http://two"}}
        places = [cache_dir_of("s3://b/flux", options) for options in ({}, one, two, {"key": "k"})]
        assert len(set(places)) == 3
        assert places[0] == places[3]
        assert places[0].name.startswith("flux-")
        assert cache_dir_of("s3://b/flux", {}) != cache_dir_of("s3://c/flux", {})


class TestListing:
    @pytest.mark.s3
    def test_a_folder_that_is_not_there(self, bucket: Remote) -> None:
        with pytest.raises(StoreError, match=r"/some/nowhere: not found") as caught:
            list_folder(f"{bucket.uri.rpartition('/')[0]}/nowhere", bucket.options, [], choose)
        assert caught.value.exit_code == 2

    def test_a_folder_of_other_things(self, remote: Remote) -> None:
        with pytest.raises(StoreRefused, match="none of its 5 files are needed; is this the right address"):
            list_folder(remote.uri, {}, ["vae"], lambda names: [])

    @pytest.mark.s3
    def test_a_bucket_that_is_away_can_be_tried_again(self, bucket: Remote, proxy: Proxy) -> None:
        proxy.is_down = True
        with pytest.raises(StoreError, match=f"{bucket.uri}: cannot list") as caught:
            bucket.copy()
        assert caught.value.exit_code == 75

    @pytest.mark.s3
    def test_a_file_comes_with_the_folders_beside_it(self, bucket: Remote, proxy: Proxy) -> None:
        listing = list_file(
            f"{bucket.uri}/top.safetensors", "top.safetensors", bucket.uri, bucket.options, ["vae"], choose
        )
        assert [file.name for file in listing.files] == ["top.safetensors", "vae/config.json", "vae/model.safetensors"]
        assert read(local_copy(cache_dir_of("x", {}), lambda: listing)) == {
            name: data for name, data in FILES.items() if name != "index.json"
        }

    def test_a_file_over_http(self, hub: Any) -> None:
        hub.repositories["a/b"] = {"x.safetensors": b"1234"}
        root = f"{hub.endpoint}/a/b/resolve/main"
        listing = list_file(f"{root}/x.safetensors?sig=secret", "x.safetensors", root, {}, ["vae"], lambda names: names)
        assert "secret" not in listing.uri
        assert read(local_copy(cache_dir_of("x", {}), lambda: listing)) == {"x.safetensors": b"1234"}

    def test_a_file_that_is_not_there(self, hub: Any) -> None:
        with pytest.raises(NotFound):
            list_file(f"{hub.endpoint}/x.safetensors", "x.safetensors", hub.endpoint, {}, [], choose)

    def test_a_server_that_is_away(self) -> None:
        root = "http://127.0.0.1:1"
        with pytest.raises(StoreError, match="cannot look up") as caught:
            list_file(f"{root}/x.safetensors", "x.safetensors", root, {}, [], choose)
        assert caught.value.exit_code == 75


# A separate process that copies from S3.
COPY = """
import json, sys
from flux_batch.download import transfer
from flux_batch.download.local_copy import list_folder, local_copy, cache_dir_of
transfer.CHUNK_BYTES = 65_536
uri, options = sys.argv[1], json.loads(sys.argv[2])
print(local_copy(cache_dir_of(uri, options), lambda: list_folder(uri, options, ["vae"], lambda names: sorted(names))))
"""


def start(bucket: Remote) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COPY, bucket.uri, json.dumps(bucket.options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.s3
def test_two_processes_fetch_once(bucket: Remote, proxy: Proxy) -> None:
    proxy.pause_s = 0.02
    processes = [start(bucket) for _ in range(2)]
    folders = {process.communicate(timeout=PATIENCE_S)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    (folder,) = folders
    assert {name: data for name, data in read(Path(folder.strip())).items() if name in FILES} == FILES
    ranges = proxy.gets()
    assert len(ranges) == len(set(ranges)) == 1 + 1 + 5 + 8 + 1  # the last is the image


@pytest.mark.s3
@pytest.mark.parametrize(("held", "num_bytes"), [("top.safetensors", 0), ("vae/model.safetensors", 500_003)])
def test_a_killed_copy_goes_on(bucket: Remote, proxy: Proxy, held: str, num_bytes: int) -> None:
    proxy.fault = lambda method, path: "hold" if method == "GET" and path.endswith(held) else None
    process = start(bucket)
    place = cache_dir_of(bucket.uri, bucket.options)
    size = sum(len(data) for data in FILES.values())
    wait_until(lambda: place.exists() and sum(map(len, read(place).values())) >= num_bytes)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)
    assert not (place / MANIFEST).exists()

    there = sum(map(len, read(place).values()))
    proxy.fault = lambda method, path: None
    proxy.requests.clear()
    process = start(bucket)
    folder, _ = process.communicate(timeout=PATIENCE_S)
    assert {name: data for name, data in read(Path(folder.strip())).items() if name in FILES} == FILES
    assert [path.name for path in place.iterdir() if path.is_dir()] == [Path(folder.strip()).name]
    assert sum(extent_of(extent) for _, extent in proxy.gets() if extent) <= size - there + len(CLUTTER)


def extent_of(header: str) -> int:
    first, _, last = header.removeprefix("bytes=").partition("-")
    return int(last) - int(first) + 1


class TestFillFolder:
    @pytest.fixture
    def listing(self, remote: Remote) -> Listing:
        """A listing with hashes, as of a hub."""
        plain = remote.listing()
        files = [replace(file, sha256=hashlib.sha256(FILES[file.name]).hexdigest()) for file in plain.files]
        return Listing("hub://model", plain.fs, tuple(files))

    def test_files_land_where_they_belong_and_nothing_else(self, listing: Listing, tmp_path: Path) -> None:
        folder = tmp_path / "models/flux"
        fill_folder(folder, lambda: listing)
        kept = read(folder)
        assert {name for name in kept if name.startswith(".")} == {FOLDER_MANIFEST, ".flux-batch.lock"}
        assert {name: kept[name] for name in FILES} == FILES

    def test_a_second_time_asks_for_nothing(self, listing: Listing, tmp_path: Path) -> None:
        fill_folder(tmp_path / "flux", lambda: listing)
        fill_folder(tmp_path / "flux", lambda: pytest.fail("asked again"))

    def test_a_damaged_file_of_ours_is_replaced(self, listing: Listing, tmp_path: Path) -> None:
        folder = tmp_path / "flux"
        fill_folder(folder, lambda: listing)
        (folder / "top.safetensors").write_bytes(b"cut")
        fill_folder(folder, lambda: listing)
        assert (folder / "top.safetensors").read_bytes() == FILES["top.safetensors"]

    def test_a_file_of_the_users_is_not_replaced(self, listing: Listing, tmp_path: Path) -> None:
        (tmp_path / "flux").mkdir()
        (tmp_path / "flux/top.safetensors").write_bytes(b"my own")
        with pytest.raises(StoreRefused, match=r"top\.safetensors: is there, but is not the file of hub://model"):
            fill_folder(tmp_path / "flux", lambda: listing)
        assert (tmp_path / "flux/top.safetensors").read_bytes() == b"my own"

    def test_what_is_there_already_is_not_fetched(
        self, listing: Listing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fetched: list[str] = []
        real = module.download_files

        def spy(listing: Listing, folder: Path, name: Any) -> dict[str, str]:
            fetched.extend(file.name for file in listing.files if not (folder / name(file)).exists())
            return real(listing, folder, name)

        monkeypatch.setattr(module, "download_files", spy)
        (tmp_path / "dev").mkdir()
        (tmp_path / "dev/top.safetensors").write_bytes(FILES["top.safetensors"])
        fill_folder(tmp_path / "dev", lambda: listing)
        assert sorted(fetched) == ["index.json", "vae/config.json", "vae/model.safetensors"]

        fetched.clear()
        other = [file for file in listing.files if file.name != "index.json"]
        other.append(RemoteFile(name="index.json", path=listing.files[-1].path, size=300_001))
        fill_folder(tmp_path / "schnell", lambda: Listing("hub://other", listing.fs, tuple(other)))
        assert fetched == ["index.json"]
        assert (tmp_path / "schnell/top.safetensors").samefile(tmp_path / "dev/top.safetensors")

    def test_files_of_the_same_bytes_are_two(self, remote: Remote, tmp_path: Path) -> None:
        remote.put({"vae/config.json": FILES["index.json"]})
        files = [replace(file, version="", sha256="") for file in remote.listing().files]
        fill_folder(tmp_path / "flux", lambda: Listing("hub://model", remote.fs, tuple(files)))
        assert {name for name in read(tmp_path / "flux") if name[0] != "."} == set(FILES)

    def test_a_folder_that_cannot_be_written(self, listing: Listing, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StoreError, match=r"file/flux: cannot be filled"):
            fill_folder(tmp_path / "file" / "flux", lambda: listing)


def test_a_cache_that_cannot_be_written_is_one_sentence(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(StoreRefused, match=r"cannot keep a copy \(FLUX_BATCH_CACHE sets another folder"):
        remote.copy()
