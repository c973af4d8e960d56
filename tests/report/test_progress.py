import json
from pathlib import Path

import pytest

from flux_batch.output.paths import PROGRESS
from flux_batch.records import ShardResult
from flux_batch.report.progress import Progress, duration
from flux_batch.report.summary import Totals
from flux_batch.storage.store import Store


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_time_left_do_not_count_the_start_of_the_workers(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(str(tmp_path))
    progress = Progress(store, num_shards=10, totals=Totals(num_committed=4, num_images=16), clock=clock)
    clock.now += 60  # workers start
    for shard in (4, 5):
        clock.now += 10
        progress.add(ShardResult(shard=shard, num_images=4, wall_s=10, is_new=True))
    written = json.loads(store.read(PROGRESS))
    assert (written["num_committed"], written["num_images"]) == (6, 24)
    assert (written["images_per_s"], written["eta_s"]) == (0.4, 40)


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
