"""A cluster of several raylets on this machine, whose nodes and workers tests can kill."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers.job_server import SYSTEM, WORKER

HEAD = {
    "num_cpus": 1,
    "num_gpus": 0,
    # Leave out processes that no test needs, since each takes seconds to start. The log monitor forwards workers'
    # output.
    "include_dashboard": False,
    "no_monitor": True,
    "include_log_monitor": False,
    # Otherwise Ray insists on port 8265, which another cluster may use, and leaves a socket open.
    "dashboard_port": None,
    "_system_config": SYSTEM,
}
REAP_S = 120


class Raylets:
    """A head without a GPU, and nodes with one each."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def num_nodes(self) -> int:
        return len(self._cluster.worker_nodes)

    def add(self) -> None:
        self._cluster.add_node(wait=False, num_gpus=1, num_cpus=0, include_dashboard=False)

    def lose(self, number: int) -> None:
        """Kill the raylet of a node; its workers notice by themselves, and may write until then."""
        node = sorted(self._cluster.worker_nodes, key=lambda node: str(node.unique_id))[number]
        dying = processes(node)
        for info in node.all_processes["raylet"]:
            _kill(info.process.pid)
        self._cluster.remove_node(node, allow_graceful=False)
        reap(dying)

    def workers(self) -> list[int]:
        """List the processes that hold a worker of a run."""
        return sorted(pid for node in self._cluster.worker_nodes for pid in self._workers_of(node))

    def _workers_of(self, node: Any) -> list[int]:
        """List the workers of one node: the children of its raylet with the actor's name."""
        raylets = [info.process.pid for info in node.all_processes.get("raylet", [])]
        return [pid for pid, parent, title in _table() if parent in raylets and title.startswith(WORKER)]

    def shut_down(self) -> None:
        nodes = [*self._cluster.worker_nodes, self._cluster.head_node]
        dying = [process for node in nodes if node for process in processes(node)]
        self._cluster.shutdown()
        reap(dying)


@contextmanager
def no_dashboard() -> Iterator[None]:
    """Start clusters without a dashboard.

    Ray starts one for its usage reports even with `include_dashboard=False`.
    """
    from ray.experimental import internal_kv

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "ray._private.node.Node.start_api_server",
            lambda node, **_: internal_kv._initialize_internal_kv(node.get_gcs_client()),
        )
        yield


@contextmanager
def raylets(num_nodes: int, **head: Any) -> Iterator[Raylets]:
    """Run a cluster with a number of nodes, and a head with given resources."""
    from ray.cluster_utils import Cluster

    with no_dashboard():
        cluster = Raylets(Cluster(initialize_head=True, head_node_args=HEAD | head))
    try:
        for _ in range(num_nodes):
            cluster.add()
        yield cluster
    finally:
        cluster.shut_down()


def kill_worker(pid: int) -> bool:
    """Kill a worker, unless it has just ended: another process may have its id. Returns: whether it was killed."""
    return any(each == pid and title.startswith(WORKER) for each, _, title in _table()) and _kill(pid)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def processes(node: Any) -> list[Any]:
    """List the processes of a node."""
    return [info.process for infos in node.all_processes.values() for info in infos]


def reap(dying: list[Any]) -> None:
    """Wait for processes that Ray killed without waiting; otherwise Python warns about them in a later test."""
    for process in dying:
        process.wait(timeout=REAP_S)


def _table() -> Iterator[tuple[int, int, bytes]]:
    """Yield the id, the parent and the title of every process."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                # proc_pid_stat(5): the second field, the name of the program, may contain blanks and brackets.
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                yield int(folder.name), parent, (folder / "cmdline").read_bytes()
            except (OSError, IndexError):
                continue  # it has ended
