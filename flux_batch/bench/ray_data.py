"""The job without this package: Ray Data's map_batches, diffusers, write_webdataset."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from flux_batch.bench.job_task import Task, stamp
from flux_batch.bench.pipeline.peer import Peer


class _Mapper:
    """diffusers' pipeline over batches of rows, in an actor."""

    def __init__(self, task: Task) -> None:
        self._size = task.size
        manager = task.source.load()
        self._pipeline = Peer("diffusers")
        self._pipeline.keep(manager)
        self._pipeline.open(task.source.assemble(manager))
        task.warm_up(self._pipeline)
        stamp(task.folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with its images."""
        rows = [
            {"prompt": prompt, "seed": int(seed)} for prompt, seed in zip(batch["prompt"], batch["seed"], strict=True)
        ]
        images = self._pipeline(self._size.request(rows))
        keys = np.array([f"{seed:09}" for seed in batch["seed"]])
        return {"__key__": keys, "png": np.stack(images), "txt": batch["prompt"]}


def run_ray_data(task: Task, prompts: Path) -> float:
    """Make all images as tars. Returns: the end of the last write, in seconds since the epoch."""
    size = task.size
    assert size.workers is not None
    assert size.shard_size is not None
    # As in our job: a local cluster, with logical GPUs if there are none, and the same number of threads per worker.
    options: dict[str, Any] = {} if size.num_gpus else {"num_gpus": size.workers}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"address": "local", "include_dashboard": False}
    env = {"OMP_NUM_THREADS": str(size.num_cpus)}
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.init(log_to_driver=False, runtime_env={"env_vars": env}, **options)
    try:
        dataset = ray.data.read_parquet(str(prompts)).repartition(-(-size.images // size.shard_size))
        images = dataset.map_batches(
            _Mapper,
            fn_constructor_args=(task,),
            batch_size=size.batch_size,
            concurrency=size.workers,
            num_gpus=size.num_gpus or 1,
            num_cpus=0,  # actors would take all cores of a small machine, and reading and writing would never start
        )
        images.write_webdataset(str(task.folder / "tars"))
        return time.time()
    finally:
        ray.shutdown()
