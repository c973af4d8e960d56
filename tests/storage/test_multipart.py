"""Multipart uploads to S3: the first writer wins, and the parts of killed writers are found."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from botocore.auth import S3SigV4Auth

from flux_batch.errors import AlreadyExists
from flux_batch.storage import multipart, turns
from flux_batch.storage import store as store_module
from flux_batch.storage.store import Store
from helpers.counting_proxy import HABITS, Proxy, counting_proxy
from helpers.s3 import Bucket, S3Server
from helpers.waiting import wait_until

LEAST_PART_BYTES = 5 << 20


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat objects of more than 1,000 bytes as large; S3 needs parts of at least 5 MiB."""
    monkeypatch.setattr(multipart, "PART_BYTES", LEAST_PART_BYTES)
    monkeypatch.setattr(multipart, "MAX_PUT_BYTES", 1000)
    monkeypatch.setattr(store_module, "LOOK_LATE_BYTES", 1000)


@pytest.fixture(params=HABITS)
def proxy(request: pytest.FixtureRequest, moto: S3Server) -> Iterator[Proxy]:
    """A server that honours conditions always, never, or only for single requests."""
    with counting_proxy(moto.endpoint_url) as proxy:
        proxy.ignores_conditions_of = HABITS[request.param]
        yield proxy


@pytest.mark.s3
@pytest.mark.parametrize("size", [10, 5000])
@pytest.mark.usefixtures("small_parts")
def test_the_first_writer_of_an_object_of_any_size_stands(moto: S3Server, proxy: Proxy, size: int) -> None:
    store = Store(f"{moto.make_bucket()}/run", moto.storage_options | {"endpoint_url": proxy.endpoint_url})
    store.put_if_absent("k", b"1" * size)
    for late in (b"1", b"2"):
        with pytest.raises(AlreadyExists):
            store.put_if_absent("k", late * size)
    assert (store.read("k"), store.list(""), store.unfinished_uploads()) == (b"1" * size, ["k"], [])


@pytest.mark.s3
@pytest.mark.usefixtures("small_parts")
def test_parts_make_the_whole_and_a_lost_one_is_sent_again(moto: S3Server) -> None:
    data = b"".join(bytes([number]) * LEAST_PART_BYTES for number in range(5)) + b"end"
    with counting_proxy(moto.endpoint_url) as proxy:
        store = Store(f"{moto.make_bucket()}/run", moto.storage_options | {"endpoint_url": proxy.endpoint_url})
        assert store.has_conditional_put
        faults, before = [503, 500], len(proxy.requests)
        proxy.fault = lambda method, path: faults.pop() if faults and "partNumber=2" in path else None
        store.put_if_absent("k", data)
        methods = Counter(method for method, path, _ in proxy.requests[before:] if "/turns/" not in path)
    assert (methods["PUT"], methods["POST"]) == (6 + 2, 2)  # one upload is begun and completed
    assert (store.read("k"), store.unfinished_uploads()) == (data, [])


@pytest.mark.s3
@pytest.mark.usefixtures("small_parts")
def test_a_writer_that_was_held_up_in_the_middle_of_an_upload_changes_nothing(moto: S3Server, proxy: Proxy) -> None:
    uri = f"{moto.make_bucket()}/run"
    slow, quick = (
        Store(uri, moto.storage_options | {"endpoint_url": url}) for url in (proxy.endpoint_url, moto.endpoint_url)
    )
    assert slow.has_conditional_put == ("PUT" not in proxy.ignores_conditions_of)
    is_held = True
    proxy.fault = lambda method, path: "hold" if is_held and method == "PUT" else None
    before, refused = len(proxy.requests), threading.Event()

    def write_late() -> None:
        with suppress(AlreadyExists):
            slow.put_if_absent("k", b"late" * 1000)
            return
        refused.set()

    late = threading.Thread(target=write_late)
    late.start()
    wait_until(lambda: any(method == "PUT" for method, *_ in proxy.requests[before:]))
    quick.put_if_absent("k", b"early" * 1000)
    is_held = False
    late.join()
    assert refused.is_set()
    assert (quick.read("k"), quick.unfinished_uploads()) == (b"early" * 1000, [])


@pytest.mark.s3
@pytest.mark.usefixtures("small_parts")
def test_of_writers_at_once_one_ends_its_upload_and_the_other_waits_for_it(moto: S3Server, proxy: Proxy) -> None:
    store = Store(f"{moto.make_bucket()}/run", moto.storage_options | {"endpoint_url": proxy.endpoint_url})
    assert store.has_conditional_put == ("PUT" not in proxy.ignores_conditions_of)
    is_held, won = True, list[bytes]()
    proxy.fault = lambda method, path: "hold" if is_held and method == "POST" and "uploadId" in path else None
    before = len(proxy.requests)

    def put(letter: bytes) -> None:
        with suppress(AlreadyExists):
            store.put_if_absent("k", letter * 2000)
            won.append(letter)

    def count(method: str, part: str) -> int:
        return sum(each == method and part in path for each, path, _ in proxy.requests[before:])

    threads = [threading.Thread(target=put, args=[letter]) for letter in (b"1", b"2")]
    for thread in threads:
        thread.start()
    wait_until(lambda: count("POST", "uploadId") > 0)
    before_waiting = count("GET", "turns")
    wait_until(lambda: count("GET", "turns") >= before_waiting + 3)
    assert count("POST", "uploadId") == 1
    is_held = False
    for thread in threads:
        thread.join()
    assert [store.read("k")] == [letter * 2000 for letter in won]
    assert (store.list("_run"), store.unfinished_uploads()) == ([], [])


@pytest.mark.s3
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("proxy", ["never"], indirect=True)
@pytest.mark.parametrize("name", ["0", "z"])
def test_a_writer_that_was_killed_in_its_turn_is_waited_for_in_vain(
    moto: S3Server, proxy: Proxy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PATIENCE_S", 0.2)
    store = Store(f"{moto.make_bucket()}/run", moto.storage_options | {"endpoint_url": proxy.endpoint_url})
    store.put_if_absent("k", b"1" * 2000)
    (queue,) = {path.rpartition("/")[0] for _, path, _ in proxy.requests if "/turns/" in path}
    store.delete("k")
    left = f"{queue.partition('/run/')[2]}/{name}"
    store.write(left, b"")
    store.put_if_absent("k", b"2" * 2000)
    assert (store.read("k"), store.list("_run")) == (b"2" * 2000, [left])


@pytest.mark.s3
def test_an_object_that_is_too_large_for_one_request_goes_in_parts(moto: S3Server) -> None:
    """Some gateways allow less than S3."""
    with counting_proxy(moto.endpoint_url) as proxy:
        store = Store(f"{moto.make_bucket()}/run", moto.storage_options | {"endpoint_url": proxy.endpoint_url})
        assert store.has_conditional_put
        whole_path = store.url("k").removeprefix("s3:/")
        proxy.fault = lambda method, path: 413 if method == "PUT" and path == whole_path else None
        store.put_if_absent("k", b"x" * 1000)
        with pytest.raises(AlreadyExists):
            store.put_if_absent("k", b"y" * 1000)
    assert (store.read("k"), store.unfinished_uploads()) == (b"x" * 1000, [])


@pytest.mark.parametrize("from_file", [False, True])
def test_a_body_over_tls_is_not_hashed_by_the_client_on_its_loop(
    tls: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_file: bool
) -> None:
    store = Store(f"{tls.make_bucket()}/run", tls.storage_options)
    assert store.has_conditional_put
    file = tmp_path / "file"
    file.write_bytes(b"x" * 1000)
    signed = []
    payload = S3SigV4Auth.payload
    monkeypatch.setattr(
        S3SigV4Auth, "payload", lambda auth, request: signed.append(payload(auth, request)) or signed[-1]
    )
    store.put_if_absent("k", file if from_file else b"x" * 1000)
    assert signed == ["UNSIGNED-PAYLOAD"]
    assert store.read("k") == b"x" * 1000


def test_an_upload_that_a_kill_left_behind_is_found_and_aborted(s3_store: Bucket) -> None:
    store = Store(f"{s3_store.uri}/some/run", s3_store.storage_options)
    bucket, _, folder = store.uri.removeprefix("s3://").partition("/")
    begun = [
        store._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
        for key in (f"{folder}/train/00000.tar", f"{folder}-of-another/train/00000.tar")
    ]
    (upload,) = store.unfinished_uploads()
    assert (store.key_of(upload), upload.id) == ("train/00000.tar", begun[0])
    store.abort(upload)
    store.abort(upload)
    assert list(store.unfinished_uploads()) == []
    assert store.list("") == []
