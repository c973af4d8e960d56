from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from flux_batch.errors import Interrupted
from flux_batch.output.commit_log import CommitLog, check_all_committed
from flux_batch.output.commits import Commits
from flux_batch.output.paths import COMMIT_LOG, COMMITS, RunFolder
from flux_batch.records import Commit
from flux_batch.storage.store import Store


class CountingStore(Store):
    """A store that records the keys that are read."""

    keys: list[str]
    is_local = False  # as in a bucket, where a page of a listing is a request

    def read(self, key: str) -> bytes:
        self.keys.append(key)
        return super().read(key)


@pytest.fixture(autouse=True)
def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux_batch.output.commit_log.NAMES_A_PAGE", 3)


def make(folder: Path, num_shards: int = 5000) -> tuple[Commits, CountingStore]:
    store = CountingStore(str(folder))
    store.keys = []
    return Commits(RunFolder(store, num_shards)), store


def commit(shard: int, num_failed: int = 0) -> Commit:
    failures = {"InvalidRow": num_failed} if num_failed else {}
    return Commit(
        shard=shard, worker="w", num_images=4, num_failed=num_failed, files=(), failures=failures, device_s=1.25
    )


def put(commits: Commits, *shards: int) -> None:
    for shard in shards:
        commits.put(commit(shard, num_failed=shard % 2))


def counts(log: CommitLog) -> dict[int, tuple[int, int, float, dict[str, int]]]:
    rows = zip(log.shards, log.num_images, log.num_failed, log.device_s, strict=True)
    return {shard: (images, failed, took, log.failures.get(shard, {})) for shard, images, failed, took in rows}


def test_a_written_log_spares_the_commits_that_it_counts(tmp_path: Path) -> None:
    commits, store = make(tmp_path)
    put(commits, 0, 1, 2, 4)  # 3 is still being made
    without = CommitLog.read(commits)
    without.write()
    put(commits, 3, 5, 9)
    store.keys.clear()

    log = CommitLog.read(commits)

    assert sorted(store.keys) == [
        "_run/commit_log.parquet",
        *(f"_run/commits/0000{shard}.json" for shard in (3, 5, 9)),
    ]
    store.delete(COMMIT_LOG)
    assert counts(log) == counts(CommitLog.read(commits))
    assert set(log.shards) == {0, 1, 2, 3, 4, 5, 9}
    assert [shard for shard, is_done in enumerate(log.is_done) if is_done] == sorted(log.shards)
    assert log.all_failures == {"InvalidRow": 4}


def test_a_log_lacks_few_shards_below_its_end(tmp_path: Path) -> None:
    commits, store = make(tmp_path)
    log = CommitLog(commits)
    for shard in (*range(10), *range(100, 110)):  # 90 between are missing, too many to ask for one by one
        put(commits, shard)
        log.add(commit(shard, num_failed=shard % 2))
    log.write()
    put(commits, 50)
    store.keys.clear()

    assert set(CommitLog.read(commits).shards) == {*range(10), 50, *range(100, 110)}
    assert store.keys == ["_run/commit_log.parquet", "_run/commits/00050.json"]


@pytest.mark.parametrize("reverted", [[1, 2], [7]])
def test_a_log_is_written_again_without_reverted_commits(tmp_path: Path, reverted: list[int]) -> None:
    commits, store = make(tmp_path)
    put(commits, *range(5))
    log = CommitLog.read(commits)
    log.write()
    for key in (COMMIT_LOG, *map(commits.key, reverted)):
        store.delete(key)
    store.keys.clear()

    log.remove(reverted)
    log.write()

    assert set(CommitLog.read(commits).shards) == {*range(5)} - {*reverted}
    assert "_run/commits/00000.json" not in store.keys


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:200] + bytes(100) + data[300:],
    ],
)
def test_a_log_that_cannot_be_used_is_rebuilt_from_the_commits(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    commits, store = make(tmp_path)
    put(commits, *range(300))
    log = CommitLog.read(commits)
    log.write()
    store.write(COMMIT_LOG, damage(store.read(COMMIT_LOG)))

    with caplog.at_level(logging.WARNING):
        again = CommitLog.read(commits)

    assert counts(again) == counts(log)
    assert "the commits are read instead" in caplog.text
    again.write()
    assert counts(CommitLog.read(commits)) == counts(log)


def test_a_log_of_a_longer_plan_counts_for_the_shards_of_ours(tmp_path: Path) -> None:
    """A driver may extend the plan while a reader of the old plan looks at the run."""
    commits, store = make(tmp_path, num_shards=4)
    put(commits, *range(10))
    longer = CommitLog.read(Commits(RunFolder(store, 10)))
    longer.write()
    store.keys.clear()

    log = CommitLog.read(commits)

    assert counts(log) == {shard: count for shard, count in counts(longer).items() if shard < 4}
    assert store.keys == [COMMIT_LOG]


def test_a_log_of_another_version_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits, store = make(tmp_path)
    put(commits, 0, 1)
    CommitLog.read(commits).write()
    store.keys.clear()

    monkeypatch.setattr("flux_batch.output.commit_log.VERSION", 3)

    assert set(CommitLog.read(commits).shards) == {0, 1}
    assert len(store.keys) == 3


@pytest.mark.parametrize("is_local", [True, False])
def test_where_all_commits_are_listed_each_is_looked_for(
    tmp_path: Path, is_local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountingStore, "is_local", is_local)
    commits, store = make(tmp_path)
    put(commits, *(range(30) if is_local else range(3)))
    log = CommitLog.read(commits)
    log.write()
    store.delete(commits.key(1))
    store.keys.clear()

    again = CommitLog.read(commits)

    assert set(again.shards) == set(log.shards) - {1}
    assert again.all_failures["InvalidRow"] == log.all_failures["InvalidRow"] - 1
    assert store.keys == [COMMIT_LOG]  # no commit was read
    again.write()
    assert counts(CommitLog.read(commits)) == counts(again)


@pytest.mark.parametrize("gone", [0, 299])
def test_a_log_of_commits_that_are_gone_is_not_used(tmp_path: Path, gone: int) -> None:
    commits, store = make(tmp_path)
    put(commits, *range(300))
    CommitLog.read(commits).write()

    store.delete(commits.key(gone))

    assert set(CommitLog.read(commits).shards) == set(range(300)) - {gone}


def test_a_run_is_complete_by_its_commits_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits, store = make(tmp_path, num_shards=300)
    put(commits, *range(300))
    CommitLog.read(commits).write()
    check_all_committed(commits)
    early = [(name, size) for name, size in store.children(COMMITS).items() if name < "00290"]
    monkeypatch.setattr(store, "_entries", lambda *asked: iter(early))  # an outdated listing
    assert 295 not in commits.listed()
    check_all_committed(commits)

    store.delete(commits.key(295))
    with pytest.raises(Interrupted, match=r"1 commits were removed, among them that of shard 295.* run the same"):
        check_all_committed(commits)

    assert not store.exists(COMMIT_LOG)


def test_a_log_is_due_after_a_thousand_commits(tmp_path: Path) -> None:
    commits, store = make(tmp_path)
    log = CommitLog(commits)
    for shard in range(1000):
        assert not log.is_due
        log.add(commit(shard))
    assert log.is_due
    log.write()
    assert not log.is_due
    size = store.size(COMMIT_LOG)
    assert size < 8000  # in columns, a commit takes less than ten bytes
    store.delete(COMMIT_LOG)
    log.write()  # nothing new
    assert not store.exists(COMMIT_LOG)
