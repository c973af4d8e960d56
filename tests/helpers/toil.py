"""Workers for tests of the engines: picklable factories, whose workers misbehave as told."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flux_batch.engine.protocol import MadeShard, Worker
from flux_batch.errors import CheckpointError, DeviceFatal, FluxBatchError, Stopped, StoreError, StoreRefused
from flux_batch.records import Attempt, FileRange, Shard, ShardResult
from flux_batch.telemetry import Heartbeat, Metrics

STEP_S = 0.05
# Longer than any test may take, so that a test that waits so long fails.
FOREVER_S = 3600.0


def make_shards(count: int) -> list[Shard]:
    nothing = FileRange(uri="none", name="none", start=0, num_rows=1)
    return [Shard(index=index, parts=(nothing,)) for index in range(count)]


def tries(folder: Path, shard: Shard) -> int:
    """Return how often a shard was begun, including this time; the count survives the process."""
    path = folder / str(shard.index)
    with path.open("a") as file:
        file.write("x")
    return path.stat().st_size


def attempts(folder: Path, index: int) -> list[dict[str, Any]]:
    """Return the events of a shard so far: each with its `Attempt`, kind, process, node and time."""
    log = folder / f"{index}.log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def settled(folder: Path, results: Iterable[ShardResult]) -> Iterator[ShardResult]:
    """Yield the results of a run, and tell its workers which shards are settled."""
    for result in results:
        (folder / f"{result.shard}.settled").touch()
        yield result


@dataclass(frozen=True)
class ToilFactory:
    """A factory of workers that misbehave at the first `times` attempts of the listed shards.

    Shards in `slow` take `slow_s`, with signs of life. Shards from the fourth on end only once `num_workers` workers
    have begun one. `makes_after` and `finishes_after` map a shard to an event of another shard, before which it is not
    made or not finished: (index, "begun", "made", "stopped", "done" or "settled"). With `settles_first`, a worker ends
    the making of a shard only once all its earlier shards are settled.
    """

    folder: Path
    raises: tuple[int, ...] = ()
    dies: tuple[int, ...] = ()
    loses_device: tuple[int, ...] = ()
    is_refused: tuple[int, ...] = ()
    meets_outage: tuple[int, ...] = ()
    hangs: tuple[int, ...] = ()
    freezes: tuple[int, ...] = ()
    slow: tuple[int, ...] = ()
    dies_finishing: tuple[int, ...] = ()
    hangs_finishing: tuple[int, ...] = ()
    times: int = 1
    seconds: float = 0.0
    slow_s: float = 0.0
    finish_s: float = 0.0
    num_workers: int = 0
    makes_after: Mapping[int, tuple[int, str]] = field(default_factory=dict)
    finishes_after: Mapping[int, tuple[int, str]] = field(default_factory=dict)
    settles_first: bool = False

    def open(self) -> Worker:
        return Toil(self)


@dataclass(frozen=True)
class MadeToil:
    """A shard made by a Toil."""

    finish: Callable[[], ShardResult]


class Toil:
    """The worker of a ToilFactory: works in small steps, gives a sign of life and checks for a stop at each."""

    def __init__(self, factory: ToilFactory) -> None:
        self._factory = factory
        self._heartbeat = Heartbeat()
        self.metrics = Metrics("toil")
        self._stopping = threading.Event()
        self._made: set[int] = set()

    def make(self, shard: Shard, attempt: Attempt) -> MadeShard:
        factory = self._factory
        number = tries(factory.folder, shard)
        self._log(shard, attempt, "begun")
        is_early = number <= factory.times
        with self._heartbeat.busy("make"):
            until = time.monotonic() + (factory.slow_s if is_early and shard.index in factory.slow else factory.seconds)
            while (left := until - time.monotonic()) > 0 or not self._may_end(shard):
                time.sleep(min(STEP_S, max(left, 0.01)))
                self._heartbeat.beat("make")
                if self._stopping.is_set():
                    self._log(shard, attempt, "stopped")
                    raise Stopped(f"shard {shard.index}: put aside")
            if is_early:
                self._misbehave(shard)
        if shard.index in factory.is_refused:
            raise StoreRefused("s3://bucket: no permission")
        self._made.add(shard.index)
        self._log(shard, attempt, "made")
        return MadeToil(partial(self._finish, shard, attempt, is_early))

    def _finish(self, shard: Shard, attempt: Attempt, is_early: bool) -> ShardResult:
        with self._heartbeat.busy("finish"):
            while not self._has_become(self._factory.finishes_after.get(shard.index)):
                time.sleep(0.01)
                self._heartbeat.beat("finish")
            time.sleep(self._factory.finish_s)
            if is_early and shard.index in self._factory.dies_finishing:
                os._exit(1)
            if is_early and shard.index in self._factory.hangs_finishing:
                time.sleep(600)
        self._log(shard, attempt, "done")
        return ShardResult(shard=shard.index, worker=str(os.getpid()), num_images=1)

    def _may_end(self, shard: Shard) -> bool:
        factory = self._factory
        if factory.settles_first and not all(self._has_become((index, "settled")) for index in self._made):
            return False
        return self._has_company(shard) and self._has_become(factory.makes_after.get(shard.index))

    def _has_become(self, event: tuple[int, str] | None) -> bool:
        if event is None:
            return True
        index, what = event
        if what == "settled":
            return (self._factory.folder / f"{index}.settled").exists()
        return any(each["what"] == what for each in attempts(self._factory.folder, index))

    def _has_company(self, shard: Shard) -> bool:
        if shard.index < 3 or not self._factory.num_workers:
            return True
        logs = self._factory.folder.glob("*.log")
        workers = {json.loads(line)["pid"] for log in logs for line in log.read_text().splitlines()}
        return len(workers) >= self._factory.num_workers

    def stop(self) -> None:
        self._stopping.set()

    def idle_s(self) -> float:
        return self._heartbeat.idle_s()

    def _misbehave(self, shard: Shard) -> None:
        factory = self._factory
        if shard.index in factory.raises:
            raise FluxBatchError(f"shard {shard.index}: the worker is moody")
        if shard.index in factory.meets_outage:
            raise StoreError("s3://bucket: 503")
        if shard.index in factory.dies:
            os._exit(1)
        if shard.index in factory.loses_device:
            raise DeviceFatal("an illegal memory access was encountered")
        if shard.index in factory.hangs:
            time.sleep(600)
        if shard.index in factory.freezes:
            os.kill(os.getpid(), signal.SIGSTOP)

    def _log(self, shard: Shard, attempt: Attempt, what: str) -> None:
        ray = sys.modules.get("ray")
        node = ray.get_runtime_context().get_node_id() if ray and ray.is_initialized() else ""
        line = asdict(attempt) | {"what": what, "pid": os.getpid(), "node": node, "at": time.monotonic()}
        with (self._factory.folder / f"{shard.index}.log").open("a") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class BrokenStart:
    """A factory whose workers cannot start: `how` is the kind of error, or else the process dies."""

    how: str

    def open(self) -> Worker:
        if self.how == "checkpoint":
            raise CheckpointError("model.safetensors: key img_in.weight is missing")
        if self.how == "stranger":
            raise ZeroDivisionError("one by nothing")
        if self.how == "device":
            raise DeviceFatal("no CUDA-capable device is detected")
        if self.how == "outage":
            raise StoreError("s3://models: 503")
        os._exit(1)
