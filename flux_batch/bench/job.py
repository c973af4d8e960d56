"""The benchmark of a whole job: the same images by a job, by bare loops over pipelines, and by Ray Data.

The contenders run one after the other, each in its own processes, and start-up does not count. A rate is the number of
images divided by the mean time of the workers, from the end of each worker's warm-up until the last image is written.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flux_batch.bench.figures import Figures, table
from flux_batch.bench.job_task import GUIDANCE, JobSize, Task, stamp
from flux_batch.bench.source import Source
from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.engine.protocol import Engine, WorkerFactory
from flux_batch.engine.stop import Stop
from flux_batch.errors import JobError, count_of
from flux_batch.job import ray_pool, run
from flux_batch.pipeline.load import prepare_process
from flux_batch.records import Shard, ShardResult
from flux_batch.telemetry import EngineState
from flux_batch.worker.protocol import ImagePipeline

# Seconds that the first bare loop waits for the last one to load its model.
_LOAD_TIMEOUT_S = 900


@dataclass(frozen=True)
class _StampedMaker:
    """A maker of pipelines for a job, which records the time when each is ready."""

    task: Task

    def __call__(self, model: ModelConfig) -> ImagePipeline:
        """Load the task's model; `model` is ignored."""
        pipeline = self.task.source.open()
        prepare_process(pipeline)
        self.task.warm_up(lambda request: pipeline(**request, output_type="np"))
        stamp(self.task.folder)
        return pipeline


@dataclass
class _StampedEngine:
    """An engine that records the last commit's time and the devices' busy time."""

    inner: Engine
    ended: float = 0.0
    device_s: float = field(default=0.0)

    def run(
        self, factory: WorkerFactory, shards: Sequence[Shard], stop: Stop, state: EngineState | None = None
    ) -> Iterator[ShardResult]:
        """Run every shard on the inner engine."""
        for result in self.inner.run(factory, shards, stop, state):
            self.ended = time.time()
            self.device_s += result.device_s
            yield result


def bench_job(
    source: Source, size: JobSize, *, engine: str = "ray", against: Sequence[str] = (), repeats: int = 1
) -> dict[str, Any]:
    """Run the contenders in turn, `repeats` times. Raises: JobError if a package is not installed."""
    for package in ["ray"] * (engine == "ray" or "ray-data" in against) + ["diffusers"] * ("ray-data" in against):
        if importlib.util.find_spec(package) is None:
            raise JobError(
                f"bench job: {package} is not installed; install it, or use --engine local without --against"
            )
    size = size.here(engine, source.device)
    contenders: dict[str, Callable[[Task], dict[str, Any]]] = {"bare loops": _bare_loops, "job": _whole_job}
    if "ray-data" in against:
        contenders["Ray Data"] = ray_data
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            with tempfile.TemporaryDirectory(prefix="flux-batch-bench-") as folder:
                task = Task(source=source, size=size, engine=engine, folder=Path(folder))
                results[name].append(run_in_process(contender, task))
    rates = {name: Figures(tuple(one["images_per_second"] for one in runs)) for name, runs in results.items()}
    ratios = {name: rates["job"].median / rate.median for name, rate in rates.items() if name != "job"}
    return {
        "benchmark": "job",
        **source.describe(),
        "size": {name: getattr(size, name) for name in JobSize.__slots__},
        "engine": engine,
        "repeats": repeats,
        "images_per_second": {name: rate.to_json() for name, rate in rates.items()},
        "job_times_as_fast_as": ratios,
        "device_busy_share": {
            name: Figures(tuple(one["device_busy_share"] for one in runs)).to_json()
            for name, runs in results.items()
            if "device_busy_share" in runs[0]
        },
        "wall_seconds_with_start_up": {
            name: Figures(tuple(one["wall_s"] for one in runs)).to_json() for name, runs in results.items()
        },
    }


def run_in_process(contender: Callable[[Task], dict[str, Any]], task: Task) -> dict[str, Any]:
    """Run a contender in its own process, isolated from the next one."""
    started = time.monotonic()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(contender, task).result()
    return {**result, "wall_s": time.monotonic() - started}


def rate(task: Task, ended: float, device_s: float | None = None) -> dict[str, Any]:
    """Return the images per second, and the busy share of the workers' time."""
    seconds = [ended - float(path.read_text()) for path in task.folder.glob("ready-*")]
    worker_s = sum(seconds)
    figures = {"images_per_second": task.size.images / (worker_s / len(seconds)), "workers": len(seconds)}
    return figures if device_s is None else {**figures, "device_busy_share": device_s / worker_s}


def _whole_job(task: Task) -> dict[str, Any]:
    """Make the images by a job: Parquet in, WebDataset out, in a local folder."""
    config = job_config(task)
    engine = _StampedEngine(LocalEngine() if task.engine == "local" else ray_pool(config))
    report = run(config, engine=engine, make_pipeline=_StampedMaker(task))
    if report.num_failed or not report.is_complete:
        raise JobError(f"bench job: {report.num_failed} images failed: {'; '.join(report.errors)}")
    return rate(task, engine.ended, engine.device_s)


def job_config(task: Task) -> JobConfig:
    """Write the prompts of a job and return its configuration."""
    size, prompts = task.size, _write_task_prompts(task)
    sampling = {"width": size.width, "height": size.height, "num_inference_steps": size.steps}
    return JobConfig.from_dict(
        {
            "name": "bench",
            "prompts": {"uri": str(prompts)},
            "output": {"uri": str(task.folder / "out"), "shard_size": size.shard_size},
            "model": {"uri": task.source.uri},
            "sampling": {**sampling, "embedded_guidance": GUIDANCE, "t5_sequence_length": size.t5_sequence_length},
            "workers": {
                "max": size.workers,
                "num_gpus": size.num_gpus,
                "num_cpus": size.num_cpus,
                "batch_size": size.batch_size,
            },
        }
    )


def _write_task_prompts(task: Task) -> Path:
    """Write the prompts of a task to one Parquet file and return its path."""
    path = task.folder / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist(task.size.rows()), path)
    return path


def _bare_loops(task: Task) -> dict[str, Any]:
    """Make the images by a loop over the pipeline in each process, and drop them."""
    size, context = task.size, multiprocessing.get_context("spawn")
    assert size.workers is not None
    barrier, ends = context.Barrier(size.workers), context.SimpleQueue()
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if size.num_gpus else []
    processes = []
    for worker in range(size.workers):
        if task.engine == "ray":
            os.environ["OMP_NUM_THREADS"] = str(size.num_cpus)  # as Ray does
            if size.num_gpus:
                number = int(worker * size.num_gpus)
                os.environ["CUDA_VISIBLE_DEVICES"] = devices[number] if devices[0] else str(number)
        processes.append(context.Process(target=_bare_loop, args=(task, worker, barrier, ends)))
        processes[-1].start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise JobError("bench job: a bare loop failed; its error is printed above")
    loops = [json.loads(ends.get()) for _ in processes]
    return rate(task, max(loop["ended"] for loop in loops), sum(loop["device_s"] for loop in loops))


def _bare_loop(task: Task, worker: int, barrier: Any, ends: Any) -> None:
    """Make every n-th batch after all loops have loaded the model."""
    size = task.size
    try:
        pipeline = task.source.open()
        task.warm_up(lambda request: pipeline(**request, output_type="np"))
    except BaseException:
        barrier.abort()
        raise
    barrier.wait(timeout=_LOAD_TIMEOUT_S)  # a killed loop must not block the others for ever
    stamp(task.folder)
    rows, device_s = size.rows(), 0.0
    batches = [rows[start : start + size.batch_size] for start in range(0, len(rows), size.batch_size)]
    for batch in batches[worker :: size.workers]:
        started = time.monotonic()
        pipeline(**size.request(batch), output_type="np")
        device_s += time.monotonic() - started
    ends.put(json.dumps({"ended": time.time(), "device_s": device_s}))


def ray_data(task: Task) -> dict[str, Any]:
    """Make the images by Ray Data and diffusers."""
    from flux_batch.bench.ray_data import run_ray_data

    return rate(task, run_ray_data(task, _write_task_prompts(task)))


def format_job(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    size = figures["size"]
    rows = [["", "images/s", "device busy", "s with start-up"]]
    for name, rates in figures["images_per_second"].items():
        busy = figures["device_busy_share"].get(name)
        wall = figures["wall_seconds_with_start_up"][name]["median"]
        rows.append([name, f"{rates['median']:.4g}", f"{100 * busy['median']:.1f} %" if busy else "", f"{wall:.1f}"])
    compared = [
        f"the job makes {share:.3f} times the images a second of {name}"
        for name, share in figures["job_times_as_fast_as"].items()
    ]
    return "\n".join(
        [
            f"{figures['model']}, {figures['dtype']}, engine {figures['engine']}: {size['images']} images of "
            f"{size['width']} x {size['height']}, {size['steps']} steps, batches of {size['batch_size']}, "
            f"{count_of(size['workers'], 'worker')}; without start-up; runs: {figures['repeats']}",
            table(rows),
            *compared,
        ]
    )
