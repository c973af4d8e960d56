"""The benchmark of planning a large data set, and of reading its last shard."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flux_batch.bench.figures import Figures, number
from flux_batch.bench.machine import measured
from flux_batch.config.schema import PromptsConfig, SamplingConfig
from flux_batch.plan.plan import Plan, make_plan
from flux_batch.prompts.source import PromptSource

_SCHEMA = pa.schema([("id", pa.string()), ("prompt", pa.string())])
_ROWS_AT_ONCE = 1 << 20


def bench_plan(
    num_rows: int, num_files: int, shard_size: int, repeats: int, rows_per_group: int = 65_536
) -> dict[str, Any]:
    """Measure planning a data set, and reading its last shard."""
    num_files = min(num_files, num_rows)
    plans: list[Plan] = []
    sizes: list[int] = []
    with tempfile.TemporaryDirectory(prefix="flux-batch-bench-") as folder:
        write_prompts(Path(folder), num_rows, num_files, rows_per_group)
        prompts = PromptsConfig(uri=(folder,))

        def plan() -> None:
            plans[:] = [make_plan(prompts, shard_size)]
            sizes[:] = [len(plans[0].to_parquet())]

        def read_last() -> None:
            rows = list(PromptSource(prompts).read(plans[0].shards[-1], SamplingConfig()))
            assert rows[-1].id == f"row-{num_rows - 1}", rows[-1]

        made = [measured(plan) for _ in range(repeats)]
        read = measured(read_last)
        num_shards = len(plans[0].shards)
    seconds = Figures(tuple(each["seconds"] for each in made))
    return {
        "benchmark": "plan",
        "rows": num_rows,
        "files": num_files,
        "rows_per_group": rows_per_group,
        "shard_size": shard_size,
        "shards": num_shards,
        "plan_bytes": sizes[0],
        "repeats": repeats,
        "seconds": seconds.to_json(),
        "cpu_seconds": Figures(tuple(each["cpu_seconds"] for each in made)).to_json(),
        "memory_bytes": max(each["memory_bytes"] for each in made),
        "rows_per_second": num_rows / seconds.median,
        "read_last_shard": read,
    }


def write_prompts(folder: Path, num_rows: int, num_files: int, rows_per_group: int) -> list[Path]:
    """Write different prompts with ids to files of about equal size, and return their paths."""
    bounds = [num_rows * file // num_files for file in range(num_files + 1)]
    paths = [folder / f"{file:06}.parquet" for file in range(num_files)]
    rows_at_once = max(1, _ROWS_AT_ONCE // rows_per_group) * rows_per_group
    for path, (start, end) in zip(paths, pairwise(bounds), strict=True):
        with pq.ParquetWriter(path, _SCHEMA) as writer:
            for first in range(start, end, rows_at_once):
                rows = _rows(first, min(first + rows_at_once, end))
                writer.write_table(rows, row_group_size=rows_per_group)
    return paths


def _rows(start: int, end: int) -> pa.Table:
    numbers = pa.array(range(start, end)).cast(pa.string())
    columns = [pc.binary_join_element_wise(text, numbers, "") for text in ("row-", "a red circle, number ")]
    return pa.table(columns, _SCHEMA)


def format_plan(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    seconds, cpu, read = figures["seconds"], figures["cpu_seconds"], figures["read_last_shard"]
    return (
        f"{figures['rows']} rows in {figures['files']} files -> {figures['shards']} shards, a plan of "
        f"{figures['plan_bytes']} bytes\n"
        f"plan        {seconds['median']:.4g} s ({seconds['least']:.4g} to {seconds['most']:.4g}), "
        f"{figures['rows_per_second']:.4g} rows a second; median of {figures['repeats']}\n"
        f"            {number(cpu['median'])} CPU seconds, {figures['memory_bytes'] / 1e6:.0f} MB\n"
        f"last shard  read in {number(read['seconds'])} s, {number(read['cpu_seconds'])} CPU seconds, "
        f"{read['memory_bytes'] / 1e6:.0f} MB"
    )
