from pathlib import Path

import pytest

from flux_batch.engine.local import LocalEngine
from flux_batch.engine.stop import Stop
from flux_batch.errors import CheckpointError, DeviceFatal, Interrupted, StoreRefused
from helpers.toil import FOREVER_S, BrokenStart, ToilFactory, attempts, make_shards
from helpers.waiting import when


def test_every_shard_has_one_result_in_order(tmp_path: Path) -> None:
    results = list(LocalEngine().run(ToilFactory(tmp_path), make_shards(5)))
    assert [result.shard for result in results] == [0, 1, 2, 3, 4]
    assert all(result.error is None for result in results)


def test_a_shard_that_fails_once_is_tried_again_after_the_others(tmp_path: Path) -> None:
    results = list(LocalEngine().run(ToilFactory(tmp_path, raises=(1,)), make_shards(3)))
    assert [(result.shard, result.error) for result in results] == [(0, None), (2, None), (1, None)]
    assert [each["number"] for each in attempts(tmp_path, 1) if each["what"] == "begun"] == [1, 2]


def test_a_shard_that_always_fails_is_given_up_with_its_reason(tmp_path: Path) -> None:
    results = list(LocalEngine(max_attempts=2).run(ToilFactory(tmp_path, raises=(1,), times=99), make_shards(3)))
    assert {result.shard: result.error for result in results} == {
        0: None,
        1: "shard 1: the worker is moody (attempt 2)",
        2: None,
    }


def test_an_error_that_no_attempt_can_mend_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(StoreRefused):
        list(LocalEngine().run(ToilFactory(tmp_path, is_refused=(1,)), make_shards(3)))
    assert (tmp_path / "1").read_text() == "x"


def test_a_lost_device_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(DeviceFatal):
        list(LocalEngine().run(ToilFactory(tmp_path, loses_device=(1,)), make_shards(3)))


def test_a_worker_that_cannot_start_ends_the_run() -> None:
    with pytest.raises(CheckpointError, match="img_in"):
        list(LocalEngine().run(BrokenStart("checkpoint"), make_shards(1)))


def test_an_outage_costs_no_attempt(tmp_path: Path) -> None:
    engine = LocalEngine(max_attempts=1, backoff_s=0.01)
    results = list(engine.run(ToilFactory(tmp_path, meets_outage=(1,), times=4), make_shards(3)))
    assert [(result.shard, result.error) for result in results] == [(0, None), (1, None), (2, None)]
    assert (tmp_path / "1").read_text() == "xxxxx"


def test_an_outage_that_lasts_ends_the_run_with_75(tmp_path: Path) -> None:
    engine = LocalEngine(outage_s=0.05, backoff_s=0.02)
    with pytest.raises(Interrupted, match=r"storage has been unavailable for 0 s \(s3://bucket: 503\)") as caught:
        list(engine.run(ToilFactory(tmp_path, meets_outage=(0,), times=10**9), make_shards(1)))
    assert caught.value.exit_code == 75


def test_a_stop_reaches_the_shard_in_hand(tmp_path: Path) -> None:
    stop = Stop()
    request = when(lambda: bool(attempts(tmp_path, 0)), lambda: stop.request("enough"))
    assert list(LocalEngine().run(ToilFactory(tmp_path, seconds=FOREVER_S), make_shards(2), stop)) == []
    request.join()
    assert [each["what"] for each in attempts(tmp_path, 0)] == ["begun", "stopped"]
    assert attempts(tmp_path, 1) == []


def test_a_shard_is_finished_while_the_next_is_made_and_no_third_is_begun(tmp_path: Path) -> None:
    factory = ToilFactory(tmp_path, finishes_after={0: (1, "made"), 1: (2, "begun")}, finish_s=0.3)
    results = list(LocalEngine().run(factory, make_shards(4)))
    assert [result.shard for result in results] == [0, 1, 2, 3]
    first, second, third = ({each["what"]: each["at"] for each in attempts(tmp_path, index)} for index in range(3))
    assert second["made"] < first["done"] < third["begun"] < second["done"]


def test_a_stop_waits_for_what_is_being_finished(tmp_path: Path) -> None:
    stop = Stop()
    request = when(lambda: bool(attempts(tmp_path, 1)), lambda: stop.request("enough"))
    factory = ToilFactory(tmp_path, finishes_after={0: (1, "stopped")}, slow=(1,), slow_s=FOREVER_S)
    assert [result.shard for result in LocalEngine().run(factory, make_shards(3), stop)] == [0]
    request.join()
    assert [each["what"] for each in attempts(tmp_path, 1)] == ["begun", "stopped"]


def test_a_stop_ends_a_rest(tmp_path: Path) -> None:
    stop = Stop()
    request = when(lambda: bool(attempts(tmp_path, 0)), lambda: stop.request("enough"))
    engine = LocalEngine(backoff_s=FOREVER_S)
    assert list(engine.run(ToilFactory(tmp_path, meets_outage=(0,)), make_shards(1), stop)) == []
    request.join()
