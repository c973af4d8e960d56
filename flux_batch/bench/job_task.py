"""What every contender of `bench job` is given, and how a worker gets ready and says so."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flux_batch.bench.source import Source

# So many shards that the end, when not every worker has one, is short against the whole; as one would choose them.
SHARDS_A_WORKER = 10
GUIDANCE = 3.5


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSize:
    """What is made, and by how many workers of which size."""

    images: int = 64
    width: int = 128
    height: int = 128
    steps: int = 4
    t5_sequence_length: int | None = None
    batch_size: int = 4
    shard_size: int | None = None  # of a worker's share the tenth part, in whole batches
    workers: int | None = None  # as many as there are GPUs, or 2
    num_gpus: float | None = None  # of a worker: 1 if there are any, else 0
    num_cpus: int = 1

    def here(self, engine: str, device: str | None = None) -> JobSize:
        """Return it with what this machine decides filled in."""
        import torch

        num_gpus = 0 if device == "cpu" else torch.cuda.device_count()
        workers = 1 if engine == "local" else self.workers or num_gpus or 2
        tenth = self.batch_size * math.ceil(self.images / workers / SHARDS_A_WORKER / self.batch_size)
        return replace(
            self,
            workers=workers,
            num_gpus=float(num_gpus > 0) if self.num_gpus is None else self.num_gpus,
            shard_size=self.shard_size or tenth,
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return the prompts, each another, with their seeds."""
        return [prompt_row(number) for number in range(self.images)]

    def request(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what a pipeline is asked for to make the images of a batch."""
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
    """What a contender is given; `folder` is its own."""

    source: Source
    size: JobSize
    engine: str
    folder: Path

    def warm_up(self, pipeline: Callable[[dict[str, Any]], Any]) -> None:
        """Make a batch that is in no data set: what is compiled, or set up with the first call, is start-up."""
        size = self.size
        pipeline(size.request([prompt_row(size.images + number) for number in range(size.batch_size)]))


def prompt_row(number: int) -> dict[str, Any]:
    """Return a prompt, another one for every number, with its seed."""
    return {"prompt": f"a red circle on a blue ground, number {number}", "seed": number}


def stamp(folder: Path) -> None:
    """Note that a worker is ready now; clocks of one machine agree."""
    (folder / f"ready-{uuid.uuid4().hex}").write_text(repr(time.time()))
