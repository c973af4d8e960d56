"""Retries: which errors are tried again, and for how long."""

from __future__ import annotations

import errno
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flux_batch.engine.stop import Stop
from flux_batch.errors import AlreadyExists, DiskFull, FluxBatchError, Interrupted, Stopped, StoreError, StoreRefused
from flux_batch.storage import multipart
from flux_batch.storage import retry as retry_module
from flux_batch.storage.filesystem import open_filesystem
from flux_batch.storage.retry import RetryPolicy, WorkerStop, with_retries
from flux_batch.storage.store import Store
from helpers.counting_proxy import Proxy, counting_proxy
from helpers.s3 import S3Server

# Turns off the retries of botocore and s3fs, which would come before ours.
NO_RETRIES_OF_THEIRS = {"config_kwargs": {"retries": {"max_attempts": 0}}}


class Clock:
    """Replaces `time`: a sleep only moves the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def failed(error: OSError) -> Future[None]:
    """Return a request that has failed."""
    request: Future[None] = Future()
    request.set_exception(error)
    return request


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def away(clock: Clock, until: float = float("inf")) -> Callable[[], str]:
    """Return an operation that fails until a time."""

    def operation() -> str:
        if clock.now < until:
            raise OSError(errno.EIO, "I/O error")
        return "back"

    return operation


def test_without_an_outage_to_wait_for_there_are_five_attempts_within_seconds(clock: Clock) -> None:
    calls: list[int] = []

    def operation() -> None:
        calls.append(1)
        raise TimeoutError("slow")

    with pytest.raises(StoreError, match="store/k: cannot read: slow"):
        with_retries("store/k", "read", operation)

    assert len(calls) == 5
    assert clock.now - 100 <= 0.5 + 1 + 2 + 4


def test_no_attempt_begins_after_the_seconds_that_a_policy_has(clock: Clock) -> None:
    attempts = []

    def silent() -> None:
        attempts.append(clock.now)
        clock.sleep(6.0)
        raise TimeoutError("no answer")

    with pytest.raises(StoreError, match="no answer"):
        RetryPolicy().with_attempts(4, within_s=10.0).with_retries("s3://b", "list", silent)
    assert len(attempts) == 2


def test_a_policy_outlasts_an_outage_and_logs_what_it_waits_for(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    signs: list[float] = []
    waiting = RetryPolicy(1800, on_wait=lambda: signs.append(clock.now))
    with caplog.at_level(logging.WARNING):
        assert waiting.with_retries("s3://b/k", "read", away(clock, 100 + 600)) == "back"

    assert max(after - before for before, after in itertools.pairwise(signs)) < 1.001
    assert 600 <= clock.now - 100 <= 600 + 30
    begin, end = [record.getMessage() for record in caplog.records]
    assert begin == "s3://b/k: [Errno 5] I/O error; waiting for the storage, for up to 1800 s"
    assert end == f"the storage is back after {clock.now - 100:.0f} s"


def test_a_policy_gives_up_after_the_outage(clock: Clock) -> None:
    with pytest.raises(StoreError) as caught:
        RetryPolicy(1800).with_retries("k", "read", away(clock))

    assert clock.now - 100 == pytest.approx(1800)
    assert caught.value.waited_s == pytest.approx(1800)


def test_all_operations_of_a_policy_are_in_one_outage(clock: Clock) -> None:
    policy = RetryPolicy(1800)
    with pytest.raises(StoreError):
        policy.with_retries("first", "read", away(clock))
    calls: list[float] = []

    def second() -> None:
        calls.append(clock.now)
        away(clock)()

    with pytest.raises(StoreError) as caught:
        policy.ended_by(lambda: None, lambda waited_s: None).with_retries("second", "read", second)
    assert calls == [pytest.approx(1900)]
    assert caught.value.waited_s == pytest.approx(1800)

    assert policy.with_retries("third", "read", lambda: "back") == "back"
    with pytest.raises(StoreError):
        policy.with_retries("fourth", "read", away(clock))
    assert clock.now == pytest.approx(1900 + 1800)


def test_a_stop_is_heard_at_once_by_what_fails_while_an_outage_lasts(clock: Clock) -> None:
    stopped: list[str] = []

    def look() -> None:
        if stopped:
            raise Interrupted(stopped[0])

    policy = RetryPolicy(1800, look)

    def stop_after(seconds: float) -> Callable[[], None]:
        def operation() -> None:
            if clock.now > 100 + seconds:
                stopped.append("stopped by SIGTERM")
            away(clock)()

        return operation

    for key in ("one", "two"):
        with pytest.raises(Interrupted):
            policy.with_retries(key, "read", stop_after(60))
    assert clock.now < 100 + 60 + 30 + 2


def test_a_request_that_is_not_answered_ends_with_the_outage_or_by_a_stop() -> None:
    stopping = [False]

    def look(waited_s: float) -> None:
        if stopping[0]:
            raise Interrupted("stopped by SIGTERM")

    silent: Future[None] = Future()
    requests = iter([failed(OSError("down")), silent])
    policy = RetryPolicy(0.1, on_request=look, attempts=2)
    with pytest.raises(StoreError, match="no answer"):
        policy.with_retries("k", "read", lambda: policy.wait_for(next(requests)))
    assert silent.cancelled()
    stopping[0], silent = True, Future()
    with pytest.raises(Interrupted):
        RetryPolicy(1800, on_request=look).wait_for(silent)
    assert silent.cancelled()


@pytest.fixture
def slow(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Future[str]]:
    """A function that makes a request which is answered after a number of seconds."""
    answers: dict[Future[str], float] = {}

    def wait(requests: list[Future[str]], timeout: float) -> SimpleNamespace:
        (request,) = requests
        clock.sleep(timeout)
        if clock.now >= answers[request]:
            request.set_result("back")
        return SimpleNamespace(done=request.done())

    def begin(seconds: float) -> Future[str]:
        request: Future[str] = Future()
        answers[request] = clock.now + seconds
        return request

    monkeypatch.setattr(retry_module, "wait", wait)
    return begin


def test_a_stop_ends_all_requests_at_one_time(clock: Clock, slow: Callable[[float], Future[str]]) -> None:
    stop = Stop()
    policy = RetryPolicy(on_request=lambda waited_s: stop.check(25))
    assert policy.wait_for(slow(60)) == "back"
    stop.request("stopped by SIGTERM")
    began = clock.now
    assert [policy.wait_for(slow(10)) for _ in range(2)] == ["back"] * 2
    with pytest.raises(Interrupted, match="SIGTERM"):
        policy.wait_for(slow(10))
    assert clock.now - began == pytest.approx(25)
    with pytest.raises(Interrupted):  # later requests do not wait
        policy.wait_for(slow(3))
    assert policy.wait_for(slow(0)) == "back"
    assert clock.now - began < 27


def test_a_late_request_has_seconds_until_one_has_no_answer(clock: Clock, slow: Callable[[float], Future[str]]) -> None:
    stop = WorkerStop(25)
    policy = stop.policy(3600, lambda: None)
    assert policy.wait_for(slow(60)) == "back"
    stop.request()
    assert policy.wait_for(slow(24)) == "back"
    clock.sleep(1)
    assert policy.wait_for(slow(2)) == "back"
    for seconds in (25, 2, 0.5):
        with pytest.raises(Stopped, match="does not answer"):
            policy.wait_for(slow(seconds))


def test_a_worker_waits_for_its_storage_until_a_stop(clock: Clock) -> None:
    stop, signs = WorkerStop(25), Counter[bool]()

    def sign() -> None:
        signs[stop.is_requested] += 1
        if signs[False] == 100:
            stop.request()

    with pytest.raises(Stopped, match="while the storage is unavailable"):
        stop.policy(3600, sign).with_retries("s3://b/k", "read", away(clock))
    assert signs == {False: 100}


def test_a_storage_that_comes_back_slowly_is_back(clock: Clock, slow: Callable[[float], Future[str]]) -> None:
    policy = RetryPolicy(300)
    with pytest.raises(StoreError):
        policy.with_retries("k", "read", away(clock))
    began = clock.now
    with pytest.raises(StoreError, match="no answer"):
        policy.with_retries("k", "read", lambda: policy.wait_for(slow(100)))
    assert clock.now - began == pytest.approx(5)
    assert policy.with_retries("k", "read", lambda: policy.wait_for(slow(4))) == "back"


@pytest.mark.parametrize("num_resets", [4, 5])
def test_long_requests_that_are_reset_are_no_outage_while_others_are_answered(clock: Clock, num_resets: int) -> None:
    policy, resets = RetryPolicy(300), iter(range(num_resets))

    def upload() -> str:
        for _ in range(60):
            clock.sleep(6)
            policy.with_retries("other", "read", lambda: "ok")
        clock.sleep(3)
        if next(resets, None) is not None:
            raise ConnectionResetError
        return "whole"

    if num_resets < 5:
        assert policy.with_retries("k", "write", upload) == "whole"
    else:
        with pytest.raises(StoreError):
            policy.with_retries("k", "write", upload)
    assert next(resets, None) is None


def test_an_outage_of_writes_alone_is_logged_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    policy = RetryPolicy(1800)

    def write() -> str:
        policy.with_retries("other", "read", lambda: "ok")
        return away(clock, 100 + 600)()

    with caplog.at_level(logging.WARNING):
        assert policy.with_retries("s3://b/k", "write", write) == "back"
    assert [record.getMessage() for record in caplog.records] == [
        "s3://b/k: [Errno 5] I/O error; waiting for the storage, for up to 1800 s"
    ]


def test_a_stop_ends_the_wait(clock: Clock) -> None:
    def look() -> None:
        if clock.now > 150:
            raise Interrupted("stopped by SIGTERM")

    with pytest.raises(Interrupted, match="SIGTERM"):
        RetryPolicy(1800, look).with_retries("k", "read", away(clock))

    assert clock.now < 152


def test_a_stop_does_not_end_what_works_at_the_second_try(clock: Clock) -> None:
    def look() -> None:
        raise Interrupted("stopped by SIGTERM")

    assert RetryPolicy(1800, look).with_retries("k", "read", away(clock, 100.001)) == "back"


@pytest.mark.parametrize(
    ("error", "kind", "exit_code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull, 75),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFull, 75),
        (OSError(errno.EROFS, "Read-only file system"), StoreRefused, 2),
        (OSError(errno.ENAMETOOLONG, "File name too long"), StoreRefused, 2),
        (PermissionError(errno.EACCES, "Permission denied"), StoreRefused, 2),
        (FileExistsError("k"), AlreadyExists, 75),
    ],
)
def test_what_will_not_pass_is_not_waited_for(
    clock: Clock, error: OSError, kind: type[FluxBatchError], exit_code: int
) -> None:
    def operation() -> None:
        raise error

    with pytest.raises(kind, match="store/k") as caught:
        RetryPolicy(1800).with_retries("store/k", "write", operation)

    assert clock.now == 100
    assert caught.value.exit_code == exit_code


def test_any_operation_can_be_retried_with_its_own_errors(clock: Clock) -> None:
    calls: list[float] = []

    def operation() -> str:
        calls.append(clock.now)
        raise KeyError(len(calls)) if len(calls) < 4 else ZeroDivisionError

    policy = RetryPolicy(attempts=3, first_wait_s=1.0)
    with pytest.raises(KeyError, match="3"):
        policy.retry(operation, lambda error: isinstance(error, KeyError))
    assert len(calls) == 3
    assert calls[1] - calls[0] <= 1
    assert calls[2] - calls[1] <= 2
    with pytest.raises(ZeroDivisionError):
        policy.retry(operation, lambda error: isinstance(error, KeyError))
    assert len(calls) == 4


def test_a_bug_is_no_outage(clock: Clock) -> None:
    with pytest.raises(ZeroDivisionError):
        RetryPolicy(1800).with_retries("k", "read", lambda: 1 / 0)

    assert clock.now == 100


# --- what servers answer


@pytest.fixture
def proxy(moto: S3Server) -> Iterator[Proxy]:
    with counting_proxy(moto.endpoint_url) as running:
        yield running


@pytest.fixture
def store(moto: S3Server, proxy: Proxy) -> Store:
    options = moto.storage_options | {"endpoint_url": proxy.endpoint_url} | NO_RETRIES_OF_THEIRS
    return Store(f"{moto.make_bucket()}/run", options)


def once(fault: int | str, method: str) -> Callable[[str, str], Any]:
    """Return a fault for the first request of a method for the object k."""
    left = [fault]
    return lambda asked, path: left.pop() if left and asked == method and "/run/k" in path else None


@pytest.mark.s3
@pytest.mark.parametrize("fault", [400, 409, 412, 500, 503, "lost"])
def test_an_object_is_created_once_whatever_the_first_answer(store: Store, proxy: Proxy, fault: int | str) -> None:
    assert store.has_conditional_put
    proxy.fault = once(fault, "PUT")
    if fault == "lost":  # the object was written, and its contents show by whom
        with pytest.raises(AlreadyExists):
            store.put_if_absent("k", b"ours")
    else:
        store.put_if_absent("k", b"ours")

    assert store.read("k") == b"ours"
    with pytest.raises(AlreadyExists):
        store.put_if_absent("k", b"theirs")


@pytest.mark.s3
@pytest.mark.parametrize("fault", [500, 503, "lost", "half"])
def test_an_object_is_read_whole_or_read_again(store: Store, proxy: Proxy, tmp_path: Path, fault: int | str) -> None:
    data = bytes(range(256)) * 1000
    store.write("k", data)

    proxy.fault = once(fault, "GET")
    assert store.read("k") == data
    proxy.fault = once(fault, "GET")
    store.download("k", tmp_path / "k")
    assert (tmp_path / "k").read_bytes() == data


@pytest.mark.s3
@pytest.mark.parametrize("fault", [409, 500, 503, "lost"])
def test_what_is_asked_twice_is_done(store: Store, proxy: Proxy, fault: int | str) -> None:
    proxy.fault = once(fault, "PUT")
    store.write("k", b"x")
    proxy.fault = once(fault, "HEAD")
    assert store.exists("k")
    proxy.fault = once(fault, "GET")
    assert store.list("") == ["k"]
    proxy.fault = once(fault, "DELETE")
    store.delete("k")
    assert not store.exists("k")


@pytest.mark.s3
@pytest.mark.parametrize(("fault", "honoured"), [(501, False), (412, True)])
def test_a_store_tells_by_its_answer_whether_it_knows_conditional_writes(
    store: Store, proxy: Proxy, fault: int, honoured: bool
) -> None:
    """MinIO and others answer 412 without further details."""
    seen: set[str] = set()

    def second_put(method: str, path: str) -> int | None:
        if method != "PUT":
            return None
        is_second = path in seen
        seen.add(path)
        return fault if is_second else None

    proxy.fault = second_put
    assert store.has_conditional_put == honoured


@pytest.mark.s3
def test_a_store_that_is_away_is_not_taken_for_one_without_conditional_writes(store: Store, proxy: Proxy) -> None:
    store = store.with_policy(RetryPolicy(attempts=2))
    seen: set[str] = set()

    def second_put(method: str, path: str) -> int | None:
        is_second = path in seen
        if method == "PUT":
            seen.add(path)
        return 503 if method == "PUT" and is_second else None

    proxy.fault = second_put
    with pytest.raises(StoreError, match="ServiceUnavailable"):
        _ = store.has_conditional_put

    proxy.fault = lambda method, path: None
    assert store.has_conditional_put


@pytest.mark.s3
def test_a_full_bucket_is_a_full_disk(store: Store, proxy: Proxy) -> None:
    proxy.fault = lambda method, path: 507 if method == "PUT" else None
    with pytest.raises(DiskFull, match=r"/run/k: cannot write: there is no room left") as caught:
        store.write("k", b"x")

    assert caught.value.exit_code == 75
    assert len(proxy.requests) == 1


@pytest.mark.s3
def test_an_upload_in_parts_that_got_lost_is_made_again(
    store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multipart, "MAX_PUT_BYTES", 0)
    assert store.has_conditional_put
    left = [404]
    proxy.fault = lambda method, path: (
        left.pop() if left and method == "POST" and "uploadId" in path and "/run/k" in path else None
    )
    store.put_if_absent("k", b"x" * 1000)

    assert (left, store.children("")) == ([], {"k": 1000})


def test_what_has_no_policy_of_ours_is_tried_again_by_the_client_of_s3(moto: S3Server) -> None:
    prompts, _ = open_filesystem("s3://bucket/prompts", moto.storage_options)
    store = Store("s3://bucket/run", moto.storage_options)
    tries = [fs._s3.meta.config.retries["total_max_attempts"] for fs in (prompts, store._fs)]
    assert tries == [5, 1]


def test_no_room_for_a_copy_names_the_disk_it_has_none_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "store"))
    store.write("k", b"x")

    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store._fs, "get_file", full)
    with pytest.raises(DiskFull, match=rf"^{tmp_path}/scratch: no room for a copy of .*store/k"):
        store.download("k", tmp_path / "scratch/k")
