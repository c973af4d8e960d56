import json
from pathlib import Path

import pytest

from flux_batch.output.paths import PROGRESS
from flux_batch.records import ShardResult
from flux_batch.report.progress.progress import Progress
from flux_batch.report.progress.snapshot import Snapshot, duration
from flux_batch.report.summary import Totals
from flux_batch.storage.store import Store
from flux_batch.telemetry import ShardCount, WorkerFigures
from helpers.waiting import wait_until


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_time_left_do_not_count_the_start_of_the_workers(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(str(tmp_path))
    totals = Totals(num_committed=4, num_images=16)
    progress = Progress(store, num_shards=10, totals=totals, clock=clock, num_left=24, expected=lambda shard: 4)
    clock.now += 60  # time for workers to start
    for shard in (4, 5):
        clock.now += 10
        progress.add(ShardResult(shard=shard, num_images=4, wall_s=10, is_new=True))
    written = json.loads(store.read(PROGRESS))
    assert (written["num_committed"], written["num_images"]) == (6, 24)
    assert (written["images_per_s"], written["eta_s"]) == (0.4, 40)


def test_images_count_as_they_are_made_and_never_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "flux_batch")
    clock = Clock()
    progress = Progress(
        Store(str(tmp_path)), 3, Totals(), clock=clock, num_left=102, expected=[60, 40, 2].__getitem__, num_gpus=1
    )
    state = progress.state
    first, second = state.start(), state.start()
    state.waiting_for = "the model to load in 2 workers"
    assert progress.snapshot().line() == "0 of 102 images; waiting for the model to load in 2 workers"
    state.waiting_for, first.up_at, second.up_at = "", 0.0, 0.0
    state.begin(first, 0)
    state.begin(second, 1)
    state.first_began_at = clock.now
    assert progress.snapshot().waiting_for == "the first images"
    clock.now += 10
    first.update(WorkerFigures({0: ShardCount(61, 24, 4, {"RowError": 2})}, 1.0))  # a row requests one more image
    second.update(WorkerFigures({1: ShardCount(40, 10)}, 1.0))
    state.begin(second, 0)  # the second helps with the first's shard
    second.update(WorkerFigures({1: ShardCount(40, 10), 0: ShardCount(61, 4)}, 1.0))
    now = progress.snapshot()
    assert (now.num_done, now.num_total, now.failures, now.workers_up) == (34, 103, {"RowError": 2}, 2)
    assert (now.images_per_s, now.eta_s, now.waiting_for) == (3.0, 23.0, "")  # 4 images existed before
    assert now.slowest
    first.update(WorkerFigures({}, 2.0))  # the shard is finished, but its result has not arrived
    assert progress.snapshot().num_done == 34
    state.settle(0)
    progress.add(ShardResult(shard=0, num_images=61, num_failed=2, failures={"RowError": 2}, is_new=True, wall_s=1))
    now = progress.snapshot()
    assert (now.num_done, now.num_total, now.last_shard, now.failures) == (71, 103, 0, {"RowError": 2})
    # The count of shard 0 arrives late.
    second.update(WorkerFigures({1: ShardCount(40, 10), 0: ShardCount(61, 60)}, 1.0))
    assert progress.snapshot().num_done == 71
    state.end(second)
    progress.report()
    assert Snapshot.from_json(json.loads(progress.store.read(PROGRESS))).images_text == "61 of 103 images (2 failed)"
    assert caplog.messages[-1].startswith("61 of 103 images (2 failed); 5.70 images/s, 7 s left; 1 of 3 shards commit")


def test_a_report_is_written_while_no_shard_ends_and_what_is_waited_for_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "flux_batch")
    monkeypatch.setattr("flux_batch.report.progress.progress.TICK_S", 0.001)
    clock = Clock()
    progress = Progress(Store(str(tmp_path)), 1, Totals(), clock=clock, num_left=4)
    with progress.shown() as state:
        state.waiting_for = "a local Ray cluster to start"
        wait_until(lambda: bool(caplog.messages))
        clock.now += 10
        wait_until(lambda: progress.store.exists(PROGRESS))
    assert caplog.messages == [
        "0 of 4 images; waiting for a local Ray cluster to start",
        "0 of 4 images; waiting for a local Ray cluster to start, 10 s so far",
    ]
    caplog.clear()
    shown: list[Snapshot] = []
    progress.stop_reason = lambda: "enough"
    with progress.shown(shown.append):  # the display shows the figures, and the log does not
        wait_until(lambda: bool(shown))
        progress.report()
    assert (shown[-1].num_total, caplog.messages) == (4, [])
    assert ("waiting", "for the shards in hand to be finished or put aside (enough)") in shown[-1].rows()


def test_a_display_that_fails_ends_neither_the_limits_nor_the_figures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "flux_batch")
    monkeypatch.setattr("flux_batch.report.progress.progress.TICK_S", 0.001)
    progress = Progress(Store(str(tmp_path)), 1, Totals(), clock=Clock(), num_left=4)
    checked: list[Snapshot] = []
    progress.check = checked.append

    def show(now: Snapshot) -> None:
        raise ValueError(f"no terminal after {len(checked)}")

    with progress.shown(show):
        wait_until(lambda: len(checked) > 4)
        progress.report()
    said, figures = caplog.messages  # once, not every second
    assert said.endswith("the log has them from now on: ValueError('no terminal after 2')")
    assert figures.startswith("0 of 4 images")


def test_speed_counts_what_was_made_now(tmp_path: Path) -> None:
    progress = Progress(Store(str(tmp_path)), 4, Totals(), clock=Clock())
    worker = progress.state.start()
    progress.state.begin(worker, 0)
    worker.update(WorkerFigures({0: ShardCount(50, 30, 30)}, 1.0))  # made by an earlier invocation
    progress.snapshot()
    progress.state.settle(0)
    for result in (
        ShardResult(shard=0, num_images=50, num_failed=5, is_new=True),
        ShardResult(shard=1, num_images=50, num_failed=20, is_new=True),
        ShardResult(shard=2, num_images=50, num_failed=50, is_new=True),
        ShardResult(shard=3, num_images=50),
    ):
        progress.add(result)
    assert (progress.num_new_images, progress.num_made) == (150, 45)


def test_a_shard_that_another_attempt_committed_counts_but_not_as_work_of_now(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    progress = Progress(store, num_shards=1, totals=Totals())
    progress.add(ShardResult(shard=0, num_images=4))
    assert (progress.totals.num_images, progress.num_new_images) == (4, 0)
    assert json.loads(store.read(PROGRESS))["images_per_s"] == 0


def test_a_failed_shard_is_an_error_and_not_progress(tmp_path: Path) -> None:
    progress = Progress(Store(str(tmp_path)), num_shards=2, totals=Totals())
    progress.add(ShardResult(shard=1, error="its worker died (attempt 3)"))
    assert progress.errors == ["shard 1: its worker died (attempt 3)"]
    assert progress.totals.num_committed == 0


def test_of_many_failed_shards_the_first_are_named(tmp_path: Path) -> None:
    progress = Progress(Store(str(tmp_path)), num_shards=1200, totals=Totals())
    for shard in range(1200):
        progress.add(ShardResult(shard=shard, error="the file changed"))
    assert (len(progress.errors), progress.errors[-1]) == (1000, "shard 999: the file changed")


def test_the_last_shard_is_always_reported(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    progress = Progress(store, num_shards=1, totals=Totals(), clock=Clock())
    progress.add(ShardResult(shard=0, num_images=4))
    assert json.loads(store.read(PROGRESS))["num_committed"] == 1


def test_the_missing_report_of_a_killed_driver_is_made_once(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    progress = Progress(store, num_shards=2, totals=Totals(num_committed=2, num_images=8), clock=Clock())
    progress.finish()
    assert json.loads(store.read(PROGRESS))["num_committed"] == 2
    store.delete(PROGRESS)
    progress.finish()
    assert not store.exists(PROGRESS)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3725, "1 h 2 min"), (90000, "1 d 1 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
