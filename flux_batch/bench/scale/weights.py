"""The benchmark of a cold start: many workers on many nodes load one model from a simulated storage."""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from flux_batch.bench.machine import quiet
from flux_batch.download.local_copy import local_copy
from flux_batch.download.transfer import Listing, RemoteFile
from flux_batch.engine.ray_pool import STARTS_PER_S
from flux_batch.errors import StoreError

_FILE_BYTES = 1000


def bench_weights(num_workers: int, num_nodes: int, *, num_files: int, request_s: float) -> dict[str, Any]:
    """Count the requests of workers, each a thread; the storage refuses the first node.

    Workers run the code of a real run, from the node's lock to its copy. Nodes are simulated by a folder each; the
    simulated storage takes `request_s` for a request, and its files have one range.
    """
    storage = _Storage(num_files, request_s)
    spread_s = (num_workers - 1) / STARTS_PER_S
    with (
        quiet("flux_batch.download"),
        tempfile.TemporaryDirectory(prefix="flux-batch-bench-") as folder,
        ThreadPoolExecutor(num_workers, thread_name_prefix="worker") as pool,
    ):
        loads = [
            pool.submit(_load, storage, Path(folder), number % num_nodes, random.uniform(0, spread_s))
            for number in range(num_workers)
        ]
        num_failed = sum(not load.result() for load in loads)
    of_nodes = storage.requests
    return {
        "benchmark": "weights",
        "workers": num_workers,
        "nodes": num_nodes,
        "files": num_files,
        "request_s": request_s,
        "begun_within_s": spread_s,
        "requests": of_nodes.total(),
        "most_requests_of_a_node": max((count for node, count in of_nodes.items() if node), default=0),
        "requests_of_the_refused_node": of_nodes[0],
        "failed_workers": num_failed,
        "most_requests_in_a_second": max(storage.seconds.values()),
        "most_requests_at_once": storage.most_at_once,
    }


def format_weights(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    return (
        f"{figures['workers']} workers on {figures['nodes']} nodes begin within {figures['begun_within_s']:.3g} s; "
        f"{figures['files']} files, {figures['request_s']:g} s a request\n"
        f"requests                  {figures['requests']}, at most {figures['most_requests_of_a_node']} of a node\n"
        f"the node that is refused  {figures['requests_of_the_refused_node']} requests, "
        f"{figures['failed_workers']} workers failed\n"
        f"most in a second          {figures['most_requests_in_a_second']}, at once {figures['most_requests_at_once']}"
    )


class _Storage:
    """A storage of weights that counts requests, by node and by second."""

    def __init__(self, num_files: int, request_s: float) -> None:
        self._request_s = request_s
        self._lock = Lock()
        self._at_once = 0
        self.files = tuple(
            RemoteFile(name=f"{number}.safetensors", path=f"{number}", size=_FILE_BYTES, version="1")
            for number in range(num_files)
        )
        self.requests: Counter[int] = Counter()
        self.seconds: Counter[int] = Counter()
        self.most_at_once = 0

    @contextmanager
    def asked(self, node: int) -> Iterator[None]:
        """Run the block as one request of a node, which takes `request_s`."""
        with self._lock:
            self.requests[node] += 1
            self.seconds[int(time.monotonic())] += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self._request_s)
            yield
        finally:
            with self._lock:
                self._at_once -= 1


class _Node:
    """The storage seen from one node, with the file system methods that downloads need."""

    protocol = "simulated"

    def __init__(self, storage: _Storage, number: int) -> None:
        self._storage = storage
        self._number = number

    def listing(self) -> Listing:
        """List the files. Raises: PermissionError on the first node."""
        with self._storage.asked(self._number):
            if not self._number:
                raise PermissionError("this node may not read")
            return Listing("simulated://weights", self, self._storage.files)

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        """Return bytes of a file."""
        with self._storage.asked(self._number):
            return bytes(end - start)


def _load(storage: _Storage, folder: Path, node: int, after_s: float) -> bool:
    """Load the weights like a worker. Returns: whether it succeeded."""
    time.sleep(after_s)
    try:
        local_copy(folder / f"node-{node}", _Node(storage, node).listing)
    except StoreError:
        return False
    return True
