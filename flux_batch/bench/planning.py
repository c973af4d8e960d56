"""The benchmark of planning a large data set: Parquet files of prompts, in a temporary folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from flux_batch.bench.figures import Figures, alternated
from flux_batch.bench.prompt_sets import write_prompts
from flux_batch.config.schema import PromptsConfig
from flux_batch.plan.plan import make_plan


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


def format_plan(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    seconds = figures["seconds"]
    return (
        f"{figures['rows']} rows in {figures['files']} files -> {figures['shards']} shards, a plan of "
        f"{figures['plan_bytes']} bytes\n"
        f"plan    {seconds['median']:.4g} s ({seconds['least']:.4g} to {seconds['most']:.4g}), "
        f"{figures['rows_per_second']:.4g} rows a second; median of {figures['repeats']}"
    )
