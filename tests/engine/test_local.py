from pathlib import Path

import pytest

from flux_batch.engine.local import LocalEngine
from flux_batch.errors import CheckpointError, StoreRefused
from runners import BrokenStart, Runner, make_shards


def test_every_shard_has_one_result_in_order(tmp_path: Path) -> None:
    results = list(LocalEngine().run(Runner(tmp_path), make_shards(5)))
    assert [result.shard for result in results] == [0, 1, 2, 3, 4]
    assert all(result.error is None for result in results)


def test_a_shard_that_fails_once_is_tried_again(tmp_path: Path) -> None:
    results = list(LocalEngine().run(Runner(tmp_path, raises=(1,)), make_shards(3)))
    assert [result.error for result in results] == [None, None, None]
    assert (tmp_path / "1").read_text() == "xx"


def test_a_shard_that_always_fails_is_given_up_with_its_reason(tmp_path: Path) -> None:
    results = list(LocalEngine(max_attempts=2).run(Runner(tmp_path, raises=(1,), times=99), make_shards(3)))
    assert [result.error for result in results] == [None, "shard 1: the store is moody (attempt 2)", None]


def test_an_error_that_no_attempt_can_mend_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(StoreRefused):
        list(LocalEngine().run(Runner(tmp_path, is_refused=(1,)), make_shards(3)))
    assert (tmp_path / "1").read_text() == "x"


def test_a_worker_that_cannot_start_ends_the_run() -> None:
    with pytest.raises(CheckpointError, match="img_in"):
        list(LocalEngine().run(BrokenStart("checkpoint"), make_shards(1)))
