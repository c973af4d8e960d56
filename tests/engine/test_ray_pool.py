import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flux_batch.engine import ray_cluster, ray_handle
from flux_batch.engine.ray_cluster import connect
from flux_batch.engine.ray_local import joins_cluster
from flux_batch.engine.ray_pool import RayPool
from flux_batch.engine.shard_queue import ShardQueue
from flux_batch.engine.stop import Stop
from flux_batch.errors import CheckpointError, Interrupted, RunIncomplete, StoreRefused
from helpers.raylets import no_dashboard
from helpers.toil import FOREVER_S, BrokenStart, ToilFactory, attempts, make_shards, settled
from helpers.waiting import wait_until, when

pytestmark = pytest.mark.ray

POOL = RayPool(max_workers=2, max_attempts=3, num_cpus=0, backoff_s=0.1, slow_s=FOREVER_S)


def begun(folder: Path, index: int) -> list[tuple[int, int, str]]:
    """Return number, losses and last loss of the `Attempt` of each try of a shard."""
    tries = attempts(folder, index)
    return [(each["number"], each["lost"], each["reason"]) for each in tries if each["what"] == "begun"]


def times(folder: Path, index: int) -> dict[str, float]:
    """Return the times at which a shard was begun, made and done; {} before it is begun."""
    return {each["what"]: each["at"] for each in attempts(folder, index)}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    with no_dashboard():
        connect(max_workers=2, num_gpus=1)
    yield
    ray.shutdown()


def test_a_second_run_of_a_process_does_not_take_the_cluster_of_the_first_for_one_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not joins_cluster()  # otherwise it would keep waiting for GPUs on a machine without any


def test_shards_are_spread_over_the_workers(tmp_path: Path) -> None:
    results = list(POOL.run(ToilFactory(tmp_path, seconds=0.1, num_workers=2), make_shards(12)))
    assert sorted(result.shard for result in results) == list(range(12))
    assert len({result.worker for result in results}) == 2


def test_no_more_workers_than_shards(tmp_path: Path) -> None:
    results = list(POOL.run(ToilFactory(tmp_path), make_shards(1)))
    assert [result.shard for result in results] == [0]


def test_the_run_survives_workers_that_die_and_devices_that_are_lost(tmp_path: Path) -> None:
    # With settles_first, a lost worker loses no other shard.
    factory = ToilFactory(tmp_path, dies=(2,), loses_device=(4,), raises=(5,), settles_first=True)
    results = list(settled(tmp_path, POOL.run(factory, make_shards(8))))
    assert sorted(result.shard for result in results) == list(range(8))
    assert all(result.error is None for result in results)
    assert {path.name for path in tmp_path.iterdir() if path.read_text() == "xx"} == {"2", "4", "5"}
    assert begun(tmp_path, 2) == [(1, 0, ""), (1, 1, "its worker died")]
    assert begun(tmp_path, 4) == [(1, 0, ""), (1, 1, "an illegal memory access was encountered")]
    assert begun(tmp_path, 5) == [(1, 0, ""), (2, 0, "")]


def test_a_shard_that_always_kills_its_worker_is_given_up_and_the_others_are_done(tmp_path: Path) -> None:
    pool = replace(POOL, max_attempts=1)
    results = {result.shard: result for result in pool.run(ToilFactory(tmp_path, dies=(1,), times=99), make_shards(4))}
    assert results.pop(1).error == "3 workers were lost on it; the last: its worker died"
    assert [result.error for result in results.values()] == [None, None, None]


def test_a_worker_that_cannot_load_ends_the_run_with_the_reason() -> None:
    with pytest.raises(CheckpointError, match=r"img_in\.weight is missing"):
        list(POOL.run(BrokenStart("checkpoint"), make_shards(4)))


def test_a_strange_error_at_the_start_is_named() -> None:
    with pytest.raises(RunIncomplete, match="could not start: ZeroDivisionError: one by nothing"):
        list(POOL.run(BrokenStart("stranger"), make_shards(4)))


def test_workers_that_keep_dying_while_they_start_end_the_run() -> None:
    with pytest.raises(RunIncomplete, match="died while they started"):
        list(replace(POOL, max_attempts=1).run(BrokenStart("death"), make_shards(4)))


def test_an_error_that_no_worker_can_mend_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(StoreRefused, match="no permission"):
        list(POOL.run(ToilFactory(tmp_path, is_refused=(0,)), make_shards(4)))


def test_devices_that_are_lost_from_the_start_are_tried_elsewhere_first() -> None:
    with pytest.raises(RunIncomplete, match=r"2 workers in a row died .* no CUDA-capable device is detected"):
        list(replace(POOL, max_attempts=1).run(BrokenStart("device"), make_shards(4)))


def test_a_worker_killed_from_outside_is_replaced(tmp_path: Path) -> None:
    kill = when(lambda: bool(attempts(tmp_path, 1)), lambda: os.kill(attempts(tmp_path, 1)[0]["pid"], signal.SIGKILL))
    results = list(POOL.run(ToilFactory(tmp_path, slow=(1,), slow_s=FOREVER_S), make_shards(4)))
    kill.join()
    assert sorted(result.shard for result in results if result.error is None) == [0, 1, 2, 3]
    assert begun(tmp_path, 1) == [(1, 0, ""), (1, 1, "its worker died")]


def test_a_worker_that_hangs_is_killed_and_one_that_is_slow_is_not(tmp_path: Path) -> None:
    pool = replace(POOL, hang_s=5.0)
    # The slow shard starts before the other hangs, and ends after the hanging worker is killed.
    factory = ToilFactory(tmp_path, hangs=(0,), makes_after={1: (0, "done")})
    results = list(pool.run(factory, make_shards(3)))
    assert sorted(result.shard for result in results if result.error is None) == [0, 1, 2]
    (first, (number, lost, reason)) = begun(tmp_path, 0)
    assert (first, number, lost) == ((1, 0, ""), 1, 1)
    assert reason.startswith("no progress for ")
    assert begun(tmp_path, 1) == [(1, 0, "")]


def test_a_process_that_does_not_even_answer_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_handle, "PING_TIMEOUT_S", 5.0)
    results = list(replace(POOL, hang_s=100).run(ToilFactory(tmp_path, freezes=(0,)), make_shards(2)))
    assert sorted(result.shard for result in results if result.error is None) == [0, 1]
    _, (_, lost, reason) = begun(tmp_path, 0)
    assert (lost, reason[:27]) == (1, "its process did not answer ")


def test_a_shard_is_finished_while_the_next_is_made_and_no_third_is_begun(tmp_path: Path) -> None:
    pool = replace(POOL, max_workers=1)
    factory = ToilFactory(tmp_path, finishes_after={0: (1, "made"), 1: (2, "begun")}, finish_s=0.5)
    results = list(pool.run(factory, make_shards(4)))
    assert [result.shard for result in results] == [0, 1, 2, 3]
    first, second, third = (times(tmp_path, index) for index in range(3))
    assert second["made"] < first["done"] < third["begun"] < second["done"]


def test_what_a_worker_makes_and_finishes_is_tried_again_when_it_is_lost(tmp_path: Path) -> None:
    pool = replace(POOL, max_workers=1)
    factory = ToilFactory(tmp_path, dies_finishing=(0,), finishes_after={0: (1, "begun")}, slow=(1,), slow_s=FOREVER_S)
    results = list(pool.run(factory, make_shards(2)))
    assert sorted(result.shard for result in results if result.error is None) == [0, 1]
    assert begun(tmp_path, 0) == begun(tmp_path, 1) == [(1, 0, ""), (1, 1, "its worker died")]


def test_a_shard_on_which_a_worker_was_lost_has_the_next_for_itself(tmp_path: Path) -> None:
    pool = replace(POOL, max_workers=1, max_attempts=1)
    factory = ToilFactory(tmp_path, dies=(1,), times=99, finish_s=0.3, seconds=0.2)
    results = {result.shard: result for result in pool.run(factory, make_shards(4))}
    assert results.pop(1).error == "3 workers were lost on it; the last: its worker died"
    assert [result.error for result in results.values()] == [None, None, None]
    assert all(len(begun(tmp_path, index)) <= 2 for index in (0, 2, 3))


def test_a_worker_that_hangs_while_it_finishes_is_killed(tmp_path: Path) -> None:
    results = list(replace(POOL, hang_s=5.0).run(ToilFactory(tmp_path, hangs_finishing=(0,)), make_shards(1)))
    assert [result.error for result in results] == [None]
    _, (_, lost, reason) = begun(tmp_path, 0)
    assert lost == 1
    assert reason.startswith("no progress for ")


def test_a_stop_waits_for_what_is_being_finished(tmp_path: Path) -> None:
    stop = Stop()
    request = when(lambda: "begun" in times(tmp_path, 1), lambda: stop.request("enough"))
    pool = replace(POOL, max_workers=1)
    factory = ToilFactory(tmp_path, finishes_after={0: (1, "stopped")}, slow=(1,), slow_s=FOREVER_S)
    results = list(pool.run(factory, make_shards(3), stop))
    request.join()
    assert [result.shard for result in results] == [0]
    assert [each["what"] for each in attempts(tmp_path, 1)] == ["begun", "stopped"]
    assert not (tmp_path / "2").exists()


def test_the_run_is_put_aside_when_the_node_of_the_driver_is_drained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    here = ray.get_runtime_context().get_node_id()
    monkeypatch.setattr(ray_cluster, "draining_nodes", lambda: {here} if (tmp_path / "0.log").exists() else set())
    stop = Stop()
    assert list(POOL.run(ToilFactory(tmp_path, seconds=FOREVER_S), make_shards(1), stop)) == []
    assert stop.reason == "the node of the driver is about to leave"
    assert [each["what"] for each in attempts(tmp_path, 0)] == ["begun", "stopped"]


def test_a_ray_that_cannot_tell_of_draining_nodes_knows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.state.state", None)
    assert ray_cluster.draining_nodes() == set()


def test_an_outage_pauses_the_shard_and_costs_no_attempt(tmp_path: Path) -> None:
    pool = replace(POOL, max_attempts=1)
    results = list(pool.run(ToilFactory(tmp_path, meets_outage=(0, 1), times=4), make_shards(3)))
    assert sorted(result.shard for result in results if result.error is None) == [0, 1, 2]
    assert begun(tmp_path, 0) == [(1, 0, "")] * 5


@pytest.mark.parametrize("where", ["start", "work"])
def test_an_outage_that_lasts_ends_the_run_with_75(tmp_path: Path, where: str) -> None:
    factory = BrokenStart("outage") if where == "start" else ToilFactory(tmp_path, meets_outage=(0, 1), times=10**9)
    with pytest.raises(Interrupted, match=r"storage has been unavailable for \d+ s \(s3://.*503\)") as caught:
        list(replace(POOL, outage_s=1.0).run(factory, make_shards(2)))
    assert caught.value.exit_code == 75


def test_a_stop_lets_workers_put_their_shards_aside(tmp_path: Path) -> None:
    stop = Stop()
    both = when(lambda: (tmp_path / "0.log").exists() and (tmp_path / "1.log").exists(), lambda: stop.request("enough"))
    assert list(POOL.run(ToilFactory(tmp_path, seconds=FOREVER_S), make_shards(5), stop)) == []
    both.join()
    assert [[each["what"] for each in attempts(tmp_path, index)] for index in (0, 1)] == [["begun", "stopped"]] * 2
    assert not (tmp_path / "2").exists()


def test_what_does_not_stop_within_the_grace_time_is_killed(tmp_path: Path) -> None:
    stop = Stop()
    request = when((tmp_path / "0.log").exists, lambda: stop.request("enough"))
    assert list(replace(POOL, drain_s=1.0).run(ToilFactory(tmp_path, hangs=(0,)), make_shards(1), stop)) == []
    request.join()


def test_a_slow_shard_at_the_end_is_begun_by_a_second_worker_and_the_first_to_finish_counts(tmp_path: Path) -> None:
    pool = replace(POOL, slow_s=0.5)
    results = list(pool.run(ToilFactory(tmp_path, slow=(1,), slow_s=FOREVER_S), make_shards(4)))
    assert sorted(result.shard for result in results) == [0, 1, 2, 3]
    first, second = [each for each in attempts(tmp_path, 1) if each["what"] == "begun"]
    assert (first["reverse_order"], second["reverse_order"]) == (False, True)
    ends = {each["pid"]: each["what"] for each in attempts(tmp_path, 1)}
    assert ends == {first["pid"]: "stopped", second["pid"]: "done"}


def test_idle_workers_are_let_go_while_the_last_shard_is_made_but_for_a_spare_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    free: list[float] = []
    looks: list[int] = []  # the pool's checks before it ends idle workers
    num_alone = ShardQueue.num_alone

    def counted(queue: ShardQueue) -> int:
        looks.append(num_alone.__get__(queue))
        return looks[-1]

    def look() -> None:
        wait_until(lambda: ray.available_resources().get("GPU", 0) == 1)
        before = len(looks)
        wait_until(lambda: len(looks) >= before + 3)
        free.append(ray.available_resources().get("GPU", 0))
        (tmp_path / "0.settled").touch()

    monkeypatch.setattr(ShardQueue, "num_alone", property(counted))
    is_last = when(lambda: len(list(tmp_path.glob("*.log"))) == 8, look)
    pool = replace(POOL, max_workers=4, num_gpus=0.5)
    factory = ToilFactory(tmp_path, makes_after={0: (0, "settled")}, seconds=0.1, num_workers=4)
    results = list(pool.run(factory, make_shards(8)))
    is_last.join()
    assert len({result.worker for result in results}) == 4
    assert free == [1]
