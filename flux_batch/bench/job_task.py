"""The task of every contender of `bench job`, and the record of a worker's start."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flux_batch.bench.source import Source

# Enough shards that the end of the run, when some workers are idle, takes a small share of it.
_SHARDS_A_WORKER = 10
GUIDANCE = 3.5


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSize:
    """The images of a task and the workers that make them."""

    images: int = 64
    width: int = 128
    height: int = 128
    steps: int = 4
    t5_sequence_length: int | None = None
    batch_size: int = 4
    shard_size: int | None = None  # None: a tenth of a worker's share, in whole batches
    workers: int | None = None  # None: the number of GPUs, or 2
    num_gpus: float | None = None  # of a worker; None: 1 if there are any, else 0
    num_cpus: int = 1

    def here(self, engine: str, device: str | None = None) -> JobSize:
        """Return the size with every None set for this machine."""
        import torch

        num_gpus = 0 if device == "cpu" else torch.cuda.device_count()
        workers = 1 if engine == "local" else self.workers or num_gpus or 2
        tenth = self.batch_size * math.ceil(self.images / workers / _SHARDS_A_WORKER / self.batch_size)
        return replace(
            self,
            workers=workers,
            num_gpus=float(num_gpus > 0) if self.num_gpus is None else self.num_gpus,
            shard_size=self.shard_size or tenth,
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return the prompts, all different, with their seeds."""
        return [_prompt_row(number) for number in range(self.images)]

    def request(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the arguments of a pipeline's call for a batch."""
        return {
            "prompt": [row["prompt"] for row in rows],
            "seed": [row["seed"] for row in rows],
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.steps,
            "embedded_guidance": GUIDANCE,
            "t5_sequence_length": self.t5_sequence_length,
        }


@dataclass(frozen=True, kw_only=True)
class Task:
    """The task of one contender, with a folder of its own."""

    source: Source
    size: JobSize
    engine: str
    folder: Path

    def warm_up(self, pipeline: Callable[[dict[str, Any]], Any]) -> None:
        """Make a batch of other prompts. Compilation and first set-up then count as start-up."""
        size = self.size
        pipeline(size.request([_prompt_row(size.images + number) for number in range(size.batch_size)]))


def _prompt_row(number: int) -> dict[str, Any]:
    """Return a prompt with its seed, different for every number."""
    return {"prompt": f"a red circle on a blue ground, number {number}", "seed": number}


def stamp(folder: Path) -> None:
    """Write the time at which a worker is ready; all workers run on one machine with one clock."""
    (folder / f"ready-{uuid.uuid4().hex}").write_text(repr(time.time()))
