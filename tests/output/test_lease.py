import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flux_batch.errors import AlreadyExists, DamagedObject, Interrupted, LeaseLost, RunHeld, StoreError
from flux_batch.output import lease as lease_module
from flux_batch.output.lease import Holder, Lease, read_holder
from flux_batch.output.process_id import ProcessId
from flux_batch.storage.store import Store
from helpers.s3 import Bucket
from helpers.waiting import wait_until

TTL_S = 60.0
ELSEWHERE = ProcessId(host="node-7", boot="b", namespace="n", pid=4242, started="1")


class Time:
    """A clock that moves only in `sleep`, and then runs the `events` that are due."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.events: list[tuple[float, Callable[[], None]]] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        for event in [event for event in self.events if event[0] <= self.now]:
            self.events.remove(event)
            event[1]()

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        self.events.append((self.now + seconds, event))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def make(store: Store, passing: Time) -> Lease:
    return Lease(store, ttl_s=TTL_S, clock=passing.clock, sleep=passing.sleep)


def hold(store: Store, epoch: int = 1, **fields: Any) -> Holder:
    """Write the lease of a driver on another machine."""
    holder = Holder(
        epoch=epoch, id=f"other-{epoch}", process=ELSEWHERE, ttl_s=TTL_S, since_unix_time=0, seen_unix_time=0
    )
    holder = replace(holder, **fields)
    store.write(f"_run/lease/{epoch:05d}.json", holder.to_json())
    return holder


def epochs(store: Store) -> list[str]:
    return [key.rpartition("/")[2] for key in store.list("_run/lease")]


def test_a_run_that_nobody_has_is_had_at_once_and_given_back(store: Store) -> None:
    passing = Time()
    assert read_holder(store) is None
    lease = make(store, passing)
    lease.acquire()
    lease.check()
    holder = read_holder(store)
    assert holder == lease.holder
    assert (holder.epoch, holder.beats, holder.process, holder.is_released) == (1, 0, ProcessId.own(), False)
    lease.beat()
    lease.release()
    lease.release()
    released = read_holder(store)
    assert released is not None
    assert (released.beats, released.is_released) == (1, True)
    make(store, passing).acquire()
    assert epochs(store) == ["00001.json", "00002.json"]
    assert passing.now == 1000


def test_old_epochs_are_tidied_away(store: Store) -> None:
    for _ in range(6):
        lease = make(store, Time())
        lease.acquire()
        lease.release()
    assert epochs(store) == ["00004.json", "00005.json", "00006.json"]


def test_a_holder_that_gives_a_sign_of_life_keeps_the_run_and_is_named(store: Store) -> None:
    passing = Time()
    holder = hold(store)
    passing.after(15, lambda: store.write("_run/lease/00001.json", replace(holder, beats=1).to_json()))
    with pytest.raises(RunHeld, match=r"node-7:4242 is at work on this run, since 1970-01-01 00:00:00 UTC; let it"):
        make(store, passing).acquire()
    assert passing.now - 1000 < 17
    assert RunHeld.exit_code == 75
    assert epochs(store) == ["00001.json"]


def test_a_holder_that_stands_still_for_its_ttl_is_followed_and_learns_of_it(store: Store) -> None:
    passing = Time()
    lost = make(store, passing)
    lost.acquire()
    lost._held = hold(store)  # it runs on another machine, and is paused
    lost.store.write("_run/progress.json", b"1")
    follower = make(store, passing)
    follower.acquire()
    assert passing.now - 1000 == pytest.approx(TTL_S)
    assert follower.holder.epoch == 2
    for step in (
        lost.check,
        lost.beat,
        lambda: lost.store.write("_run/progress.json", b"2"),
        lambda: lost.store.put_if_absent("new", b""),
        lambda: lost.store.delete("_run/progress.json"),
    ):
        with pytest.raises(LeaseLost, match=rf"{ProcessId.own()} has taken this run over, since node-7:4242 gave no"):
            step()
    lost.release()
    follower.check()
    assert not follower.holder.is_released
    assert (store.read("_run/progress.json"), store.exists("new")) == (b"1", False)


def test_a_write_that_waited_for_the_storage_is_not_made_if_the_run_was_taken_over_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    passing = Time()
    driver = make(store, passing)
    driver.acquire()
    replace_file, tries = os.replace, []

    def away(source: str, target: str) -> None:
        tries.append(target)
        monkeypatch.setattr(os, "replace", replace_file)
        passing.now += TTL_S
        hold(store, epoch=2)
        raise ConnectionError("the storage is away")

    monkeypatch.setattr(os, "replace", away)
    with pytest.raises(LeaseLost):
        driver.store.write("_run/progress.json", b"stale")
    assert len(tries) == 1
    assert not store.exists("_run/progress.json")


def test_the_time_to_wait_is_the_holders_own(store: Store) -> None:
    passing = Time()
    hold(store, ttl_s=10.0)
    make(store, passing).acquire()
    assert passing.now - 1000 == pytest.approx(10)


def test_a_holder_of_this_machine_that_has_ended_is_followed_at_once(store: Store) -> None:
    passing = Time()
    hold(store, process=replace(ProcessId.own(), started="1"))
    make(store, passing).acquire()
    assert passing.now == 1000


def test_a_holder_of_this_machine_that_ends_while_watched_is_followed_then(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    passing = Time()
    hold(store)
    monkeypatch.setattr(ProcessId, "is_gone", lambda process: process == ELSEWHERE and passing.now >= 1003)
    make(store, passing).acquire()
    assert passing.now == 1003


def test_a_holder_that_leaves_while_watched_is_followed_then(store: Store) -> None:
    passing = Time()
    holder = hold(store)
    passing.after(5, lambda: store.write("_run/lease/00001.json", replace(holder, is_released=True).to_json()))
    make(store, passing).acquire()
    assert passing.now - 1000 < 7


def test_of_many_watchers_of_a_dead_driver_one_follows(store: Store) -> None:
    passing = Time()
    hold(store)
    passing.after(59.5, lambda: hold(store, epoch=2))  # another watcher is quicker
    passing.after(70, lambda: hold(store, epoch=2, beats=1))
    with pytest.raises(RunHeld):
        make(store, passing).acquire()
    assert epochs(store) == ["00001.json", "00002.json"]


def test_the_wait_can_be_ended_from_outside(store: Store) -> None:
    def stop(seconds: float) -> None:
        raise Interrupted("stopped by SIGTERM")

    hold(store)
    with pytest.raises(Interrupted, match="SIGTERM"):
        Lease(store, ttl_s=TTL_S, sleep=stop).acquire()
    assert epochs(store) == ["00001.json"]


def test_a_lost_answer_to_our_own_claim_is_no_rival(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def written_twice(self: Store, key: str, data: bytes) -> None:
        self.write(key, data)
        raise AlreadyExists(key)

    monkeypatch.setattr(Store, "put_if_absent", written_twice)
    lease = make(store, Time())
    lease.acquire()
    lease.check()


def test_a_rival_who_claims_the_same_epoch_in_the_same_moment_wins_or_loses_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(self: Store, key: str, data: bytes) -> None:
        hold(self)
        raise AlreadyExists(key)

    monkeypatch.setattr(Store, "put_if_absent", too_late)
    lease = make(store, Time())
    with pytest.raises(RunHeld, match="node-7:4242"):
        lease.acquire()
    lease.release()
    holder = read_holder(store)
    assert holder is not None
    assert (holder.id, holder.is_released) == ("other-1", False)


def test_without_conditional_writes_the_one_who_was_overwritten_has_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "has_conditional_put", False)
    passing = Time()
    passing.after(1, lambda: hold(store))  # its write begins before ours and arrives after it
    with pytest.raises(RunHeld, match="node-7:4242"):
        make(store, passing).acquire()
    assert passing.now - 1000 == lease_module.SETTLE_S


def test_a_write_that_lands_late_on_such_a_store_is_noticed_at_the_next_look(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "has_conditional_put", False)
    lease = make(store, Time())
    lease.acquire()
    hold(store)
    with pytest.raises(LeaseLost, match="node-7:4242 has taken this run over"):
        lease.beat()
    holder = read_holder(store)
    assert holder is not None
    assert holder.id == "other-1"


def test_a_stop_while_a_claim_settles_leaves_the_run_free(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(seconds: float) -> None:
        raise Interrupted("stopped by SIGTERM")

    monkeypatch.setattr(Store, "has_conditional_put", False)
    with pytest.raises(Interrupted):
        Lease(store, sleep=stop).acquire()
    holder = read_holder(store)
    assert holder is not None
    assert holder.is_released


def test_a_lease_that_somebody_deleted_is_lost(store: Store) -> None:
    passing = Time()
    lease = make(store, passing)
    lease.acquire()
    store.delete("_run/lease/00001.json")
    passing.now += TTL_S
    with pytest.raises(LeaseLost, match="is gone from _run/lease"):
        lease.check()


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"version": 1, "process": {}}', b"\xff"])
def test_a_damaged_lease_is_named(store: Store, data: bytes) -> None:
    store.write("_run/lease/00001.json", data)
    with pytest.raises(DamagedObject, match=r"_run/lease/00001\.json: not a lease of this program"):
        make(store, Time()).acquire()


def test_a_lease_that_is_empty_while_it_is_replaced_is_read_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rclone's server returns an empty lease at that moment."""
    lease = make(store, Time())
    lease.acquire()
    answers = iter([b"", store.read("_run/lease/00001.json")])
    monkeypatch.setattr(Store, "read", lambda store, key: next(answers))
    assert read_holder(store) == lease.holder


def test_a_lease_says_for_people_who_and_when(store: Store) -> None:
    lease = make(store, Time())
    lease.acquire()
    written = json.loads(store.read("_run/lease/00001.json"))
    assert (written["version"], written["ttl_s"], written["process"]["pid"]) == (1, 60, ProcessId.own().pid)
    assert written["since_unix_time"] == pytest.approx(time.time(), abs=30)


def test_beats_come_quickly_first_and_never_stop_coming() -> None:
    pauses = [lease_module.pause_s(60, beats) for beats in (0, 1, 2, 3, 4, 5, 5000)]
    assert pauses == [1, 2, 4, 8, 16, 24, 24]


def test_a_kept_lease_beats_by_itself_and_outlives_its_ttl(store: Store) -> None:
    with Lease(store, ttl_s=0.4) as lease:
        with pytest.raises(RunHeld):  # at the next beat, even if that is late
            Lease(store, ttl_s=0.4, clock=lambda: 0.0).acquire()
        wait_until(lambda: lease.holder.beats >= 9)  # beats are less than half of the ttl apart
        lease.check()
    holder = read_holder(store)
    assert holder is not None
    assert holder.is_released


def test_a_lease_is_looked_at_when_a_heartbeat_was_late_and_now_and_then(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At all other times no driver can have taken over the run."""
    looks = []
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda store, key: looks.append(key) or read(store, key))
    passing = Time()
    lease = make(store, passing)
    lease.acquire()

    def beat(after_s: float) -> int:
        before = len(looks)
        passing.now += after_s
        lease.beat()
        lease.store.write("_run/progress.json", b"")
        return len(looks) - before

    assert [beat(TTL_S / lease_module.BEATS_PER_LEASE) for _ in range(lease_module.LOOK_BEATS + 2)] == [
        1,
        *([0] * 14),
        1,
        0,
    ]
    assert [beat(seconds) for seconds in (24, 31, 24, 24)] == [0, 2, 1, 0]  # also before a write and at the next beat


def test_the_loss_is_told_once_without_being_asked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "LOOK_BEATS", 1)
    told: list[str] = []
    with Lease(store, ttl_s=0.4, on_lost=told.append):
        hold(store, epoch=2)
        wait_until(lambda: bool(told))
        wait_until(lambda: all(thread.name != "lease" for thread in threading.enumerate()))
    assert len(told) == 1
    assert "node-7:4242 has taken this run over" in told[0]


def test_a_store_that_is_away_for_a_while_costs_no_lease(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    failed: list[str] = []
    with Lease(store, ttl_s=0.4, on_lost=told.append) as lease:
        with monkeypatch.context() as patch:

            def away(self: Store, key: str, data: bytes) -> None:
                failed.append(key)
                raise StoreError("503")

            patch.setattr(Store, "write", away)
            wait_until(lambda: len(failed) == 2 * lease_module.BEATS_PER_LEASE)
            beats = lease.holder.beats
        wait_until(lambda: lease.holder.beats > beats)
        lease.check()
    assert told == []


def test_an_error_within_releases_too(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), Lease(store):
        raise ZeroDivisionError
    Lease(store).acquire()
    assert len(epochs(store)) == 2


def rivals(stores: list[Store]) -> tuple[list[Lease], list[BaseException]]:
    """Start drivers at the same moment. Returns: the leases of the winners, and the errors of the others."""
    start = threading.Barrier(len(stores))
    winners: list[Lease] = []
    told: list[BaseException] = []

    def drive(store: Store) -> None:
        lease = Lease(store, ttl_s=8)
        start.wait()
        try:
            lease.__enter__()
            winners.append(lease)
        except RunHeld as error:
            told.append(error)

    threads = [threading.Thread(target=drive, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return winners, told


def test_of_drivers_in_the_same_moment_one_has_the_run(tmp_path: Path) -> None:
    for round_ in range(2):
        winners, told = rivals([Store(str(tmp_path / str(round_))) for _ in range(4)])
        assert (len(winners), len(told)) == (1, 3)
        winners[0].check()
        winners[0].release()


def test_of_drivers_in_the_same_moment_one_has_the_run_in_a_bucket(s3_store: Bucket) -> None:
    stores = [Store(s3_store.uri, s3_store.storage_options) for _ in range(3)]
    winners, told = rivals(stores)
    assert (len(winners), len(told)) == (1, 2)
    winners[0].check()
    winners[0].release()
    follower = Lease(stores[1])
    follower.acquire()
    assert follower.holder.epoch == 2
    with pytest.raises(LeaseLost):
        winners[0].check()


def test_the_heartbeat_goes_on_after_an_error_that_nobody_expects(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If such an error ended the thread, the next driver would take the run from a live one."""
    with Lease(store, ttl_s=0.5) as lease:
        write, errors = Store.write, [RuntimeError("Session is closed")]

        def failing(one: Store, key: str, data: bytes | Path) -> None:
            if errors:
                raise errors.pop()
            write(one, key, data)

        monkeypatch.setattr(Store, "write", failing)
        wait_until(lambda: lease.holder.beats >= 2)
    assert errors == []
