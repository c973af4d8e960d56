"""A cold start of many workers: each node downloads once while its workers wait, and may fail alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flux_batch.download import local_copy as module
from flux_batch.download import transfer
from flux_batch.download.local_copy import local_copy
from flux_batch.download.transfer import Listing, RemoteFile
from flux_batch.errors import DiskFull, StoreError
from flux_batch.storage import retry
from helpers.waiting import wait_until

NUM_NODES, WORKERS_A_NODE = 25, 8
FILES = {"model.safetensors": os.urandom(5000), "config.json": b"{}"}
CHUNK = 1000


@dataclass
class Weights:
    """The storage of the weights for one node; counts requests, and the most that are answered at once."""

    fails: Callable[[], None] = lambda: None
    requests: Counter[str] = field(default_factory=Counter)
    protocol = "memory"
    at_once = 0
    most_at_once = 0

    def listing(self) -> Listing:
        self.requests["list"] += 1
        files = (RemoteFile(name=name, path=name, size=len(data), version="1") for name, data in FILES.items())
        return Listing("memory://weights", self, tuple(files))  # type: ignore[arg-type]

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        self.requests["range"] += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self.fails()
        finally:
            self.at_once -= 1
        return FILES[path][start:end]


@pytest.fixture(autouse=True)
def setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(transfer, "NUM_STREAMS", 2)
    monkeypatch.setattr(retry, "ATTEMPTS", 2)


@pytest.fixture
def at_the_lock(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """The number of workers that have reached the lock of each node."""
    come = Counter[Path]()
    locked = module.locked

    @contextmanager
    def counted(path: Path, what: str) -> Iterator[None]:
        come[path.parent] += 1
        with locked(path, what):
            yield

    monkeypatch.setattr(module, "locked", counted)
    return come


def start(nodes: dict[Path, Weights]) -> dict[Path, list[Any]]:
    """Load the weights in all workers of all nodes at once. Returns: the folder or the error of each."""

    def load(node: Path) -> Any:
        try:
            return local_copy(node, nodes[node].listing)
        except StoreError as error:
            return error

    with ThreadPoolExecutor(len(nodes) * WORKERS_A_NODE) as workers:
        loads = {node: [workers.submit(load, node) for _ in range(WORKERS_A_NODE)] for node in nodes}
        return {node: [one.result() for one in each] for node, each in loads.items()}


def fail(error: OSError) -> None:
    raise error


def test_a_node_fetches_once_and_one_that_cannot_costs_itself(tmp_path: Path, at_the_lock: Counter[Path]) -> None:
    nodes = {tmp_path / f"node-{number}": Weights() for number in range(NUM_NODES)}
    cut_off = tmp_path / "node-7"

    def cut() -> None:
        wait_until(lambda: at_the_lock[cut_off] == WORKERS_A_NODE)
        raise ConnectionResetError("cut off")

    nodes[cut_off].fails = cut
    found = start(nodes)

    errors = found.pop(cut_off)
    assert {type(error) for error in errors} == {StoreError}
    assert len({str(error) for error in errors}) == 1  # the error of the worker that downloaded
    asked = nodes.pop(cut_off).requests
    assert asked["list"] == 1
    assert asked["range"] <= 2 * 2  # two streams with two attempts
    for node, folders in found.items():
        assert {path.name: path.read_bytes() for path in folders[0].iterdir()} == FILES
        assert set(folders) == {folders[0]}
        # Without hashes, the listing is requested and compared again after the transfer.
        assert nodes[node].requests == {"list": 2, "range": 6}
        assert nodes[node].most_at_once <= 2

    later = Weights()
    assert start({cut_off: later})[cut_off] == [cut_off / folders[0].name] * WORKERS_A_NODE
    assert later.requests == {"list": 2, "range": 6}
    assert not (cut_off / "failed.json").exists()


def test_a_full_disk_is_one_for_all_workers_of_its_node(
    tmp_path: Path, at_the_lock: Counter[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, *others: Any, **options: Any) -> None:
        wait_until(lambda: at_the_lock[tmp_path] == WORKERS_A_NODE)
        raise DiskFull(f"{folder}: no room")

    monkeypatch.setattr(transfer, "check_room", full)
    weights = Weights(partial(fail, OSError("nothing is read")))
    errors = start({tmp_path: weights})[tmp_path]
    assert {type(error) for error in errors} == {DiskFull}
    assert weights.requests == {"list": 1}
