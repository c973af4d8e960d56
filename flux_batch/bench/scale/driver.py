"""The benchmark of the driver: the loop of the Ray engine, on a simulated cluster of many workers."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from flux_batch.bench.machine import memory_bytes, quiet
from flux_batch.bench.scale.simulated_cluster import SimulatedCluster, Timing
from flux_batch.engine.ray_pool import Pool, RayPool
from flux_batch.engine.stop import Stop
from flux_batch.plan.shards import Shards
from flux_batch.telemetry import EngineState

# Seconds of real workers: making a shard, finishing it on the second thread, loading the model.
_SHARD_S, _FINISH_S, _OPEN_S = 300.0, 10.0, 60.0
# Seconds after which a second worker starts a slow shard at the end, as in a job.
_SLOW_S = RayPool.slow_s
_ROWS_A_SHARD = 256
_LAST = 0.01


def bench_driver(
    num_workers: Sequence[int],
    num_shards: int,
    *,
    speedup: float,
    spread: float,
    slow_share: float,
    slow_factor: float,
    in_order: bool = False,
) -> dict[str, Any]:
    """Measure the driver of each number of workers.

    speedup: of simulated workers over real ones. in_order: run the shards in the order of the plan, as if rows did not
    show their work, not the largest first.
    """
    timing = Timing(
        shard_s=_SHARD_S / speedup,
        finish_s=_FINISH_S / speedup,
        open_s=_OPEN_S / speedup,
        spread=spread,
        slow_share=slow_share,
        slow_factor=slow_factor,
    )
    shards = one_file(num_shards, _ROWS_A_SHARD)
    if not in_order:
        shards = replace(shards, numbers=array("i", sorted(shards.numbers, key=timing.seconds, reverse=True)))
    return {
        "benchmark": "driver",
        "shards": num_shards,
        "in_order": in_order,
        "speedup": speedup,
        "spread": spread,
        "slow_share": slow_share,
        "slow_factor": slow_factor,
        "runs": [_run(number, shards, timing, _SLOW_S / speedup) for number in num_workers],
    }


def format_driver(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    head = (
        f"{figures['shards']} shards on simulated workers, {figures['speedup']:g} times as fast as real ones; the "
        f"longest shard {figures['spread']:g} times the shortest, {figures['slow_share']:.0%} of the workers "
        f"{figures['slow_factor']:g} times as slow; {'in order' if figures['in_order'] else 'the largest first'}\n"
        "workers  busy (least)       driver a shard  memory     run        last 1 %"
    )
    return "\n".join([head, *map(_line, figures["runs"])])


def _line(run: dict[str, Any]) -> str:
    busy = f"{run['busy']:.2%} ({run['least_busy']:.2%})"
    return (
        f"{run['workers']:<7}  {busy:<17}  {run['driver_us_a_shard']:>11.0f} us  {run['memory_bytes'] / 1e6:>6.1f} MB"
        f"  {run['run_s']:>7.1f} s  {run['last_s']:.1f} s ({run['last_s'] / run['run_s']:.1%})"
    )


def _run(num_workers: int, shards: Sequence[Any], timing: Timing, slow_s: float) -> dict[str, Any]:
    """Run all shards. The busy share counts from the first answer of a worker until no shard is waiting."""
    cluster = SimulatedCluster(timing)
    pool = Pool(RayPool(num_workers, slow_s=slow_s), cluster, shards, Stop(), EngineState(), lambda **gauges: None)
    before = memory_bytes()
    most, num_done, busy = before, 0, list[float]()
    before_last_s = dry_s = 0.0
    with quiet("flux_batch.engine"):
        for _ in pool.results():
            num_done += 1
            if not busy and not pool.queue.num_waiting:
                dry_s = cluster.clock()
                busy = [worker.busy_until(dry_s) / (dry_s - timing.open_s) for worker in cluster.workers]
            if num_done == int(len(shards) * (1 - _LAST)):
                before_last_s = cluster.clock()
            if num_done % 1000 == 0:
                most = max(most, memory_bytes())
        run_s = cluster.clock()
        pool.end()
    return {
        "workers": num_workers,
        "busy": sum(busy) / len(busy),
        "least_busy": min(busy),
        "driver_s": cluster.driver_s,
        "driver_us_a_shard": cluster.driver_s / len(shards) * 1e6,
        "answers": cluster.num_answers,
        "memory_bytes": max(most, memory_bytes()) - before,
        "run_s": run_s,
        "last_s": run_s - before_last_s,
    }


def one_file(number: int, rows_a_shard: int) -> Shards:
    """Return the shards of a plan with one file."""
    numbers = pa.array(range(number), pa.int32())
    columns = {
        "shard": numbers,
        "file": pa.array(["prompts.parquet"] * number),
        "start": pa.array(range(0, number * rows_a_shard, rows_a_shard), pa.int64()),
        "num_rows": pa.repeat(rows_a_shard, number),
        "offset": pa.repeat(0, number),
        "line": pa.repeat(0, number),
    }
    return Shards.from_columns(pa.table(columns), {"prompts.parquet": "/prompts.parquet"})
