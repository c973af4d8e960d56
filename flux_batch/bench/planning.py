"""How long planning a large data set takes: Parquet files of prompts, in a temporary folder."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flux_batch.bench.figures import Figures, alternated
from flux_batch.config.schema import PromptsConfig
from flux_batch.plan.plan import make_plan

ROW_GROUP = 65_536


def bench_plan(num_rows: int, num_files: int, shard_size: int, repeats: int) -> dict[str, Any]:
    """Plan a data set again and again, and write the plan down each time."""
    num_files = min(num_files, num_rows)
    sizes: list[int] = []
    shards: list[int] = []
    with tempfile.TemporaryDirectory(prefix="flux-batch-bench-") as folder:
        write_prompts(Path(folder), num_rows, num_files)
        prompts = PromptsConfig(uri=(folder,))

        def plan(_: int) -> None:
            made = make_plan(prompts, shard_size)
            sizes.append(len(made.to_parquet()))
            shards.append(len(made.shards))

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


def write_prompts(folder: Path, num_rows: int, num_files: int) -> None:
    """Write `num_rows` prompts in files of about the same size, a row group at a time."""
    schema = pa.schema([("id", pa.string()), ("prompt", pa.string())])
    bounds = [num_rows * number // num_files for number in range(num_files + 1)]
    for number, (start, end) in enumerate(pairwise(bounds)):
        with pq.ParquetWriter(folder / f"{number:05}.parquet", schema) as writer:
            for first in range(start, end, ROW_GROUP):
                rows = range(first, min(first + ROW_GROUP, end))
                columns = [[f"row-{row}" for row in rows], [f"a red circle, number {row}" for row in rows]]
                writer.write_table(pa.table(columns, schema=schema))


def format_plan(figures: dict[str, Any]) -> str:
    """Lay the figures out for people."""
    seconds = figures["seconds"]
    return (
        f"{figures['rows']} rows in {figures['files']} files -> {figures['shards']} shards, a plan of "
        f"{figures['plan_bytes']} bytes\n"
        f"plan    {seconds['median']:.4g} s ({seconds['least']:.4g} to {seconds['most']:.4g}), "
        f"{figures['rows_per_second']:.4g} rows a second; median of {figures['repeats']}"
    )
