from collections.abc import Iterator
from pathlib import Path

import pytest

from flux_batch.engine.ray_pool import RayPool, connect
from flux_batch.errors import CheckpointError, RunIncomplete, StoreRefused
from runners import BrokenStart, Runner, make_shards

pytestmark = pytest.mark.ray

POOL = RayPool(max_workers=2, max_attempts=3, num_cpus=0)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    connect(max_workers=2, num_gpus=1)
    yield
    ray.shutdown()


def test_shards_are_spread_over_the_workers(tmp_path: Path) -> None:
    results = list(POOL.run(Runner(tmp_path, seconds=0.1), make_shards(12)))
    assert sorted(result.shard for result in results) == list(range(12))
    assert len({result.worker for result in results}) == 2


def test_no_more_workers_than_shards(tmp_path: Path) -> None:
    results = list(POOL.run(Runner(tmp_path), make_shards(1)))
    assert [result.shard for result in results] == [0]


def test_the_run_survives_workers_that_die_and_devices_that_are_lost(tmp_path: Path) -> None:
    results = list(POOL.run(Runner(tmp_path, dies=(2,), loses_device=(4,), raises=(5,)), make_shards(8)))
    assert sorted(result.shard for result in results) == list(range(8))
    assert all(result.error is None for result in results)
    assert {path.name for path in tmp_path.iterdir() if path.read_text() == "xx"} == {"2", "4", "5"}


def test_a_shard_that_always_kills_its_worker_is_given_up_and_the_others_are_done(tmp_path: Path) -> None:
    results = {result.shard: result for result in POOL.run(Runner(tmp_path, dies=(1,), times=99), make_shards(4))}
    assert results.pop(1).error == "its worker died (attempt 3)"
    assert [result.error for result in results.values()] == [None, None, None]


def test_a_worker_that_cannot_load_ends_the_run_with_the_reason() -> None:
    with pytest.raises(CheckpointError, match=r"img_in\.weight is missing"):
        list(POOL.run(BrokenStart("checkpoint"), make_shards(4)))


def test_a_strange_error_at_the_start_is_named() -> None:
    with pytest.raises(RunIncomplete, match="could not start: ZeroDivisionError: one by nothing"):
        list(POOL.run(BrokenStart("stranger"), make_shards(4)))


def test_workers_that_keep_dying_while_they_start_end_the_run() -> None:
    with pytest.raises(RunIncomplete, match="died while they started"):
        list(POOL.run(BrokenStart("death"), make_shards(4)))


def test_an_error_that_no_worker_can_mend_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(StoreRefused, match="no permission"):
        list(POOL.run(Runner(tmp_path, is_refused=(0,)), make_shards(4)))
