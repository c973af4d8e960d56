"""Nodes that die, are drained, join late or return, in a cluster of raylets with one worker each."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flux_batch.engine.ray_pool import RayPool
from flux_batch.records import ShardResult
from helpers.raylets import HEAD, no_dashboard, processes, reap
from helpers.toil import FOREVER_S, ToilFactory, attempts, make_shards
from helpers.waiting import PATIENCE_S, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.nodes]

POOL = RayPool(max_workers=2, max_attempts=1, num_cpus=0, slow_s=FOREVER_S)


@pytest.fixture(scope="module")
def raylets() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    with no_dashboard():
        cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    cluster.connect()
    head = processes(cluster.head_node)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    reap(head)


@pytest.fixture
def cluster(raylets: Any) -> Iterator[Any]:
    """A cluster whose head has no GPU; a test adds nodes with one GPU each, which are removed after it."""
    yield raylets
    gone = list(raylets.worker_nodes)
    for node in gone:
        remove(raylets, node)
    wait_until(lambda: not {node.node_id for node in gone} & alive())


def remove(cluster: Any, node: Any) -> None:
    """Kill a node without a clean shutdown."""
    dying = processes(node)
    cluster.remove_node(node, allow_graceful=False)
    reap(dying)


def alive() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def drain(cluster: Any, node_id: str) -> None:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + 60) * 1000)
    accepted, message = GcsClient(address=cluster.address).drain_node(node_id, reason, "spot notice", deadline_ms)
    assert accepted, message


def run(factory: ToilFactory, num_shards: int) -> tuple[list[ShardResult], threading.Thread]:
    """Run shards in another thread, so that the test can interfere."""
    results: list[ShardResult] = []
    thread = threading.Thread(target=lambda: results.extend(POOL.run(factory, make_shards(num_shards))), daemon=True)
    thread.start()
    return results, thread


def begun(folder: Path, index: int) -> list[dict[str, Any]]:
    return [each for each in attempts(folder, index) if each["what"] == "begun"]


def test_a_node_that_dies_costs_its_shard_nothing_and_a_new_one_is_used(cluster: Any, tmp_path: Path) -> None:
    first = cluster.add_node(num_gpus=1, num_cpus=0)
    results, thread = run(ToilFactory(tmp_path, slow=(0,), slow_s=FOREVER_S), 2)
    wait_until((tmp_path / "0.log").exists)
    remove(cluster, first)
    second = cluster.add_node(num_gpus=1, num_cpus=0)
    thread.join(PATIENCE_S)
    assert sorted((result.shard, result.error) for result in results) == [(0, None), (1, None)]
    assert [(each["number"], each["lost"], each["node"]) for each in begun(tmp_path, 0)] == [
        (1, 0, first.node_id),
        (1, 0, second.node_id),
    ]


def test_a_draining_node_gets_no_shard_and_its_own_goes_on_elsewhere(cluster: Any, tmp_path: Path) -> None:
    going = cluster.add_node(num_gpus=1, num_cpus=0)
    results, thread = run(ToilFactory(tmp_path, slow=(0,), slow_s=FOREVER_S, seconds=0.3), 12)
    wait_until((tmp_path / "0.log").exists)
    staying = cluster.add_node(num_gpus=1, num_cpus=0)
    drain(cluster, going.node_id)
    thread.join(PATIENCE_S)
    assert sorted(result.shard for result in results if result.error is None) == list(range(12))
    first, second = begun(tmp_path, 0)
    assert (first["node"], second["node"], second["lost"]) == (going.node_id, staying.node_id, 0)
    (stopped,) = [each for each in attempts(tmp_path, 0) if each["what"] == "stopped"]
    assert stopped["node"] == going.node_id
    assert all(each["node"] == staying.node_id for index in range(1, 12) for each in begun(tmp_path, index))


def test_a_worker_that_comes_late_takes_its_share(cluster: Any, tmp_path: Path) -> None:
    nodes = [cluster.add_node(num_gpus=1, num_cpus=0)]
    results, thread = run(ToilFactory(tmp_path, seconds=0.1, num_workers=2), 15)
    wait_until((tmp_path / "2.log").exists)
    nodes.append(cluster.add_node(num_gpus=1, num_cpus=0))
    thread.join(PATIENCE_S)
    assert sorted(result.shard for result in results if result.error is None) == list(range(15))
    used = [begun(tmp_path, index)[0]["node"] for index in range(15)]
    assert set(used[:2]) == {nodes[0].node_id}
    assert set(used) == {node.node_id for node in nodes}
