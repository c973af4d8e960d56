"""One contract for every store: a local disk, fsspec's memory and two S3 servers, one of them over TLS too."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flux_batch.errors import AlreadyExists, DiskFull, NotFound, StoreError, StoreRefused
from flux_batch.storage import contact
from flux_batch.storage.entries import Entry, local_entries
from flux_batch.storage.retry import ATTEMPTS
from flux_batch.storage.store import STORE_TMP, Store
from helpers.counting_proxy import counting_proxy
from helpers.s3 import KEY, SECRET, S3Server, assert_clear, free_port

KINDS = ["local", "memory", *(pytest.param(name, marks=pytest.mark.s3) for name in ("moto", "rclone", "tls"))]
LEAST_PART_BYTES = 5 << 20
# Otherwise botocore would retry for seconds within our first attempt.
NO_BOTO_RETRIES = {"config_kwargs": {"retries": {"max_attempts": 1}}}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """The URI and the storage options of a run that does not exist yet."""
    if kind == "local":
        return str(tmp_path / "a run"), {}
    if kind == "memory":
        return f"memory://{uuid.uuid4().hex}/run", {}
    server: S3Server = request.getfixturevalue(kind)
    return f"{server.make_bucket()}/some/run", server.storage_options


@pytest.fixture
def store(place: tuple[str, dict[str, Any]]) -> Store:
    return Store(*place)


def race(store: Store, key: str, writers: int = 8) -> list[int]:
    """Create one key in several threads at once. Returns: the threads that succeeded."""
    start = threading.Barrier(writers)
    won: list[int] = []

    def create(number: int) -> None:
        start.wait()
        try:
            store.put_if_absent(key, b"%d" % number)
        except AlreadyExists:
            return
        won.append(number)

    threads = [threading.Thread(target=create, args=[number]) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


def test_a_part_of_an_object_can_be_read(store: Store) -> None:
    data = bytes(range(256)) * 4
    store.write("a/part", data)
    assert store.size("a/part") == 1024
    assert store.read_range("a/part", 0, 1) == data[:1]
    assert store.read_range("a/part", 100, 1000) == data[100:1000]
    assert store.read_range("a/part", 1000, 2000) == data[1000:]
    for look in (lambda: store.size("a/none"), lambda: store.read_range("a/none", 0, 5)):
        with pytest.raises(NotFound, match="a/none"):
            look()


def test_what_is_written_can_be_read_listed_and_deleted(store: Store, tmp_path: Path) -> None:
    big = os.urandom(3_000_000)
    (tmp_path / "big").write_bytes(big)
    store.write("a/1.bin", b"one")
    store.write("a/b/2.bin", b"")
    store.write("ab/3 ü'%.bin", tmp_path / "big")

    assert store.list("a") == ["a/1.bin", "a/b/2.bin"]
    assert store.list("") == ["a/1.bin", "a/b/2.bin", "ab/3 ü'%.bin"]
    assert (store.read("a/1.bin"), store.read("a/b/2.bin"), store.read("ab/3 ü'%.bin")) == (b"one", b"", big)
    store.download("ab/3 ü'%.bin", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == big
    assert store.exists("a/1.bin")
    store.delete("a/1.bin")
    store.delete("a/1.bin")
    assert not store.exists("a/1.bin")
    assert store.list("a") == ["a/b/2.bin"]


def test_write_replaces(store: Store) -> None:
    store.write("k", b"a long first value")
    store.write("k", b"second")

    assert store.read("k") == b"second"


@pytest.mark.parametrize("from_file", [False, True])
def test_put_if_absent_refuses_a_taken_key(store: Store, tmp_path: Path, from_file: bool) -> None:
    (tmp_path / "first").write_bytes(b"first")
    (tmp_path / "second").write_bytes(b"second")
    first, second = (tmp_path / "first", tmp_path / "second") if from_file else (b"first", b"second")

    store.put_if_absent("deep/k", first)
    with pytest.raises(AlreadyExists, match="deep/k"):
        store.put_if_absent("deep/k", second)

    assert store.read("deep/k") == b"first"
    assert store.list("") == ["deep/k"]


def test_a_key_put_by_another_client_is_taken(store: Store, place: tuple[str, dict[str, Any]]) -> None:
    uri, options = place
    other = Store(uri, options | {"skip_instance_cache": True})
    assert store.list("commits") == []
    assert not store.exists("commits/1")
    other.put_if_absent("commits/1", b"theirs")

    with pytest.raises(AlreadyExists):
        store.put_if_absent("commits/1", b"ours")
    assert store.list("commits") == ["commits/1"]


def test_conditional_writes_are_found_by_trying(store: Store, kind: str) -> None:
    assert store.has_conditional_put == (kind != "rclone")
    assert store.list("") == []


def test_nothing_there_is_not_found_and_an_empty_list(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing/there"):
        store.read("nothing/there")
    with pytest.raises(NotFound, match="nothing/there"):
        store.download("nothing/there", tmp_path / "x")
    assert not store.exists("nothing/there")
    assert store.list("nothing") == []


def test_the_children_of_a_folder_are_its_objects_with_their_sizes_and_its_folders(store: Store) -> None:
    store.write("a/1.bin", b"one")
    store.write("a/b/2.bin", b"")
    store.write("a/b/c/3.bin", b"")
    store.write("ab/3.bin", b"x")

    assert store.children("a") == {"1.bin": 3, "b": None}
    assert store.children("a/b") == {"2.bin": 0, "c": None}
    assert {"a": None, "ab": None}.items() <= store.children("").items()  # on a disk, _run stays as an empty folder
    assert store.children("nothing") == {}


def test_what_is_removed_while_a_folder_is_listed_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_bytes(b"one")
    assert Store(str(tmp_path)).children("") == {"file": 3}


def test_a_scan_begins_behind_the_name_that_is_given(store: Store) -> None:
    for name in ("10", "11", "2", "20/12"):
        store.write(f"some/{name}", b"xyz")

    assert store.scan("some", sorted) == [("10", 3), ("11", 3), ("2", 3), ("20", None)]
    assert store.scan("some", dict, after="10") == {"11": 3, "2": 3, "20": None}
    assert store.scan("some", dict, after="20") == {}
    assert store.scan("some", dict, with_sizes=False).keys() == {"10", "11", "2", "20"}
    assert store.scan("none", list) == []


def test_any_key_of_a_folder_is_found_however_deep(store: Store) -> None:
    store.write("a/b/c/1.bin", b"one")
    store.write("a/b/c/2.bin", b"")
    store.write("ab/3.bin", b"")

    assert store.any_key("a") in ("a/b/c/1.bin", "a/b/c/2.bin")
    assert store.any_key("ab") == "ab/3.bin"
    assert store.any_key("nothing") is None
    for key in store.list("a"):
        store.delete(key)
    assert store.any_key("a") is None  # on a disk, the folders stay


def test_any_key_is_found_without_a_look_at_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def entries(folder: str, *, with_sizes: bool) -> Iterator[Entry]:
        for entry in local_entries(folder, with_sizes=with_sizes):
            looked.append(entry[0])
            yield entry

    monkeypatch.setattr("flux_batch.storage.store.local_entries", entries)
    store = Store(str(tmp_path))
    for number in range(9):
        store.write(f"train/{number % 3}/{number}.png", b"")

    assert store.any_key("train") in store.list("train")
    assert len(looked) == 2


def test_a_folder_is_no_object(store: Store) -> None:
    store.write("a/b", b"x")

    assert not store.exists("a")


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["moto", "rclone"], indirect=True)
def test_a_list_has_no_folders_even_if_its_own_fills_while_it_is_made(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = store._fs._lsdir

    async def look_and_fill(path: str, **options: Any) -> Any:
        seen = await look(path, **options)
        await store._fs._pipe_file(f"{path}/b", b"x")
        return seen

    monkeypatch.setattr(store._fs, "_lsdir", look_and_fill)
    assert store.list("a") == []
    monkeypatch.undo()
    assert store.list("a") == ["a/b"]


def test_check_writable_leaves_nothing_behind(store: Store) -> None:
    store.check_writable()

    assert store.list("") == []


@pytest.mark.parametrize("kind", ["local", pytest.param("moto", marks=pytest.mark.s3)], indirect=True)
def test_of_racing_writers_exactly_one_wins(store: Store) -> None:
    for number in range(5):
        won = race(store, f"commits/{number}")

        assert len(won) == 1
        assert store.read(f"commits/{number}") == b"%d" % won[0]
    assert store.list(STORE_TMP) == []


def test_a_local_write_that_is_killed_leaves_no_half_object(tmp_path: Path) -> None:
    code = (
        "import os, sys; from flux_batch.storage.store import Store\n"
        "os.replace = os.link = lambda *names: os._exit(9)\n"
        "getattr(Store(sys.argv[1]), sys.argv[2])('k', b'half')"
    )
    store = Store(str(tmp_path))
    store.write("k", b"whole")
    for method in ("write", "put_if_absent"):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path), method]).returncode == 9

    assert store.read("k") == b"whole"
    assert [key.rpartition("/")[0] for key in store.list("")] == [STORE_TMP, STORE_TMP, ""]


@pytest.mark.parametrize(("method", "name"), [("write", "replace"), ("put_if_absent", "link")])
def test_a_local_write_outlives_a_sweep_of_half_written_files_and_empty_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, name: str
) -> None:
    """This happens to a heartbeat while the driver cleans up at the end of the run."""
    store = Store(str(tmp_path))
    publish, sweeps = getattr(os, name), [lambda: (tmp_path / "folder").rmdir(), lambda: sweep(store)]

    def swept(*names: str) -> None:
        if sweeps:
            sweeps.pop()()
        publish(*names)

    monkeypatch.setattr(os, name, swept)
    getattr(store, method)("folder/k", b"whole")

    assert sweeps == []
    assert (store.read("folder/k"), store.list("")) == (b"whole", ["folder/k"])


def sweep(store: Store) -> None:
    for key in store.list(STORE_TMP):
        store.delete(key)


def test_a_failed_local_write_leaves_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(NotFound):
        store.write("k", tmp_path / "no such file")

    assert store.list("") == []


def test_a_disk_without_hard_links_still_refuses_a_taken_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = Store(str(tmp_path))
    store.put_if_absent("k", b"first")
    with pytest.raises(AlreadyExists):
        store.put_if_absent("k", b"second")

    assert (store.read("k"), store.list("")) == (b"first", ["k"])


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreRefused, match="file/run") as caught:
        Store(str(tmp_path / "file" / "run")).check_writable()

    assert caught.value.exit_code == 2


def test_transient_errors_are_retried_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    store.write("k", b"v")
    answers: list[Exception] = [OSError(5, "I/O error"), TimeoutError("slow")]
    read = store._fs.cat_file
    calls: list[str] = []

    def flaky(path: str) -> Any:
        calls.append(path)
        if answers:
            raise answers.pop(0)
        return read(path)

    monkeypatch.setattr(store._fs, "cat_file", flaky)
    assert store.read("k") == b"v"
    assert len(calls) == 3

    answers.append(OSError(28, "No space left on device"))
    with pytest.raises(StoreError, match="No space left") as caught:
        store.read("k")
    assert len(calls) == 4
    assert caught.value.exit_code == 75


@pytest.mark.s3
def test_wrong_credentials_are_refused_whatever_is_asked(rclone: S3Server) -> None:
    uri = f"{rclone.make_bucket()}/run"
    store = Store(uri, rclone.storage_options | {"secret": "wrong-secret-12"})
    for ask in (
        store.check_writable,
        lambda: store.read("k"),
        lambda: store.list("k"),
        lambda: store.exists("k"),
        lambda: store.put_if_absent("k", b""),
    ):
        with pytest.raises(StoreRefused, match="credentials") as caught:
            ask()
        assert_clear(caught.value, uri)
        assert caught.value.exit_code == 2


@pytest.mark.s3
@pytest.mark.parametrize("server", ["moto", "rclone"])
def test_a_missing_bucket_is_refused(server: str, request: pytest.FixtureRequest) -> None:
    options = request.getfixturevalue(server).storage_options
    store = Store("s3://no-such-bucket-here/run", options)
    for ask in (store.check_writable, lambda: store.read("k"), lambda: store.exists("k"), lambda: store.list("")):
        with pytest.raises(StoreRefused, match="no such bucket") as caught:
            ask()
        assert_clear(caught.value, "s3://no-such-bucket-here/run")
        assert caught.value.exit_code == 2


def test_an_endpoint_that_does_not_answer_is_worth_another_run() -> None:
    options = {"key": KEY, "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{free_port()}", **NO_BOTO_RETRIES}
    store = Store("s3://bucket/run", options)
    words = f"endpoint_url {options['endpoint_url']} does not answer: Could not connect to .*; check it and"
    with pytest.raises(StoreError, match=words) as caught:
        store.exists("k")

    assert not isinstance(caught.value, (StoreRefused, NotFound))
    assert_clear(caught.value, "s3://bucket/run")
    assert caught.value.exit_code == 75


@pytest.mark.s3
def test_a_store_that_has_answered_is_tried_more_often_than_one_that_never_has(moto: S3Server) -> None:
    with counting_proxy(moto.endpoint_url) as proxy:
        options = moto.storage_options | {"endpoint_url": proxy.endpoint_url}
        stranger, known = (Store(moto.make_bucket(), options) for _ in range(2))
        known.list("")
        numbers = []
        for store, words in ((stranger, "does not answer"), (known, "cannot list")):
            proxy.requests, proxy.is_down = [], True
            with pytest.raises(StoreError, match=words):
                store.list("")
            numbers.append(len(proxy.requests))
            proxy.is_down = False
    assert numbers[0] * ATTEMPTS == numbers[1] * 3  # aiohttp retries a cut connection once


@pytest.mark.s3
@pytest.mark.parametrize("is_silent", [True, False])
def test_a_first_request_without_an_answer_goes_on_only_if_a_small_one_has_one(
    moto: S3Server, monkeypatch: pytest.MonkeyPatch, is_silent: bool
) -> None:
    monkeypatch.setattr(contact, "SILENCE_S", 0.1)
    bucket = moto.make_bucket()
    Store(bucket, moto.storage_options).write("large", b"bytes")
    with counting_proxy(moto.endpoint_url) as proxy:

        def fault(method: str, path: str) -> str | None:
            is_other_asked = any("large" not in path for _, path, _ in proxy.requests)
            return "hold" if is_silent or ("large" in path and not is_other_asked) else None

        proxy.fault = fault
        store = Store(bucket, moto.storage_options | {"endpoint_url": proxy.endpoint_url})
        if is_silent:
            words = f"endpoint_url {proxy.endpoint_url} does not answer: no answer for . s; check it and"
            with pytest.raises(StoreError, match=words):
                store.read("large")
            assert sum("large" in path for _, path, _ in proxy.requests) == 1
        else:
            assert store.read("large") == b"bytes"
        proxy.fault = lambda method, path: None


@pytest.mark.s3
def test_what_the_store_said_is_what_is_read(moto: S3Server) -> None:
    with counting_proxy(moto.endpoint_url) as proxy:
        store = Store(moto.make_bucket(), moto.storage_options | {"endpoint_url": proxy.endpoint_url})
        store.list("")
        for status, kind, words in ((403, StoreRefused, "AccessDenied; check path"), (507, DiskFull, "XMinio")):
            proxy.fault = lambda method, path, status=status: status
            with pytest.raises(kind, match=words) as caught:
                store.write("k", b"x")
            assert "None" not in str(caught.value)


@pytest.mark.s3
def test_a_certificate_that_nobody_knows_is_no_answer(tls: S3Server) -> None:
    options = tls.storage_options | {"client_kwargs": {}}
    with pytest.raises(StoreError, match=rf"{tls.endpoint_url} does not answer: SSL validation failed"):
        Store("s3://bucket/run", options).exists("k")


def test_a_stored_file_reads_like_a_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    store = Store(str(tmp_path))
    store.write("file", data)
    with store.open("file") as file:
        assert file.read(10) == data[:10]
        assert file.seek(-5, io.SEEK_END) == len(data) - 5
        assert file.read() == data[-5:]
        assert file.read(1) == b""
        file.seek(1000)
        file.seek(5, io.SEEK_CUR)
        assert (file.tell(), file.read(5000)) == (1005, data[1005:6005])
        file.seek(10**9)
        assert file.read(5) == b""
    with pytest.raises(ValueError, match="before start"):
        store.open("file").seek(-1)
    with pytest.raises(NotFound):
        store.open("none")
