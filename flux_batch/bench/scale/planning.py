"""The benchmark of planning a large data set, and the Parquet files that it plans."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flux_batch.bench.figures import Figures, alternated
from flux_batch.config.schema import PromptsConfig
from flux_batch.plan.plan import make_plan

_ROWS_PER_GROUP = 65_536


def bench_plan(num_rows: int, num_files: int, shard_size: int, repeats: int) -> dict[str, Any]:
    """Measure planning a data set, the writing of the plan included."""
    num_files = min(num_files, num_rows)
    sizes: list[int] = []
    shards: list[int] = []
    with tempfile.TemporaryDirectory(prefix="flux-batch-bench-") as folder:
        write_prompts(Path(folder), planned_row, num_rows, num_files)
        prompts = PromptsConfig(uri=(folder,))

        def plan(_: int) -> None:
            result = make_plan(prompts, shard_size)
            sizes.append(len(result.to_parquet()))
            shards.append(len(result.shards))

        seconds: Figures = alternated({"plan": plan}, repeats)["plan"]
    return {
        "benchmark": "plan",
        "rows": num_rows,
        "files": num_files,
        "shard_size": shard_size,
        "shards": shards[-1],
        "plan_bytes": sizes[-1],
        "repeats": repeats,
        "seconds": seconds.to_json(),
        "rows_per_second": num_rows / seconds.median,
    }


def planned_row(number: int) -> dict[str, Any]:
    """Return a prompt with an id, different for every number."""
    return {"id": f"row-{number}", "prompt": f"a red circle, number {number}"}


def write_prompts(folder: Path, make_row: Callable[[int], dict[str, Any]], num_rows: int, num_files: int) -> list[Path]:
    """Write `make_row` of each number to files of about equal size, and return their paths."""
    schema = pa.Table.from_pylist([make_row(0)]).schema
    bounds = [num_rows * number // num_files for number in range(num_files + 1)]
    paths = [folder / f"{number:05}.parquet" for number in range(num_files)]
    for path, (start, end) in zip(paths, pairwise(bounds), strict=True):
        with pq.ParquetWriter(path, schema) as writer:
            for first in range(start, end, _ROWS_PER_GROUP):
                rows = [make_row(number) for number in range(first, min(first + _ROWS_PER_GROUP, end))]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return paths


def format_plan(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    seconds = figures["seconds"]
    return (
        f"{figures['rows']} rows in {figures['files']} files -> {figures['shards']} shards, a plan of "
        f"{figures['plan_bytes']} bytes\n"
        f"plan    {seconds['median']:.4g} s ({seconds['least']:.4g} to {seconds['most']:.4g}), "
        f"{figures['rows_per_second']:.4g} rows a second; median of {figures['repeats']}"
    )
