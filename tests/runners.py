"""Runners for the tests of the engines: picklable recipes whose work is to misbehave in one way."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from flux_batch.engine.protocol import Work
from flux_batch.errors import CheckpointError, DeviceFatal, StoreError, StoreRefused
from flux_batch.records import Shard, ShardResult


def make_shards(count: int) -> list[Shard]:
    return [Shard(index=index, uri="none", name="none", start=0, num_rows=1) for index in range(count)]


def tries(folder: Path, shard: Shard) -> int:
    """Count how often a shard was begun, this time included; survives the death of the process."""
    path = folder / str(shard.index)
    with path.open("a") as file:
        file.write("x")
    return path.stat().st_size


@dataclass(frozen=True)
class Runner:
    """Each named shard misbehaves at its first `times` tries."""

    folder: Path
    raises: tuple[int, ...] = ()
    dies: tuple[int, ...] = ()
    loses_device: tuple[int, ...] = ()
    is_refused: tuple[int, ...] = ()
    times: int = 1
    seconds: float = 0.0

    def open(self) -> Work:
        return self.work

    def work(self, shard: Shard) -> ShardResult:
        is_early = tries(self.folder, shard) <= self.times
        time.sleep(self.seconds)
        if is_early and shard.index in self.raises:
            raise StoreError(f"shard {shard.index}: the store is moody")
        if is_early and shard.index in self.dies:
            os._exit(1)
        if is_early and shard.index in self.loses_device:
            raise DeviceFatal("an illegal memory access was encountered")
        if shard.index in self.is_refused:
            raise StoreRefused("s3://bucket: no permission")
        return ShardResult(shard=shard.index, worker=str(os.getpid()), num_images=1)


@dataclass(frozen=True)
class BrokenStart:
    """A worker that cannot start: with our own error, with a stranger's, or with its death."""

    how: str

    def open(self) -> Work:
        if self.how == "checkpoint":
            raise CheckpointError("model.safetensors: key img_in.weight is missing")
        if self.how == "stranger":
            raise ZeroDivisionError("one by nothing")
        os._exit(1)
