"""Jobs for tests: tables of prompts, job files, and the files that a run wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flux_batch.config.schema import JobConfig
from flux_batch.storage.store import Store


def write_prompts(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a Parquet file of prompts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def make_job(folder: Path, rows: list[dict[str, Any]] | None = None, **sections: dict[str, Any]) -> JobConfig:
    """Make a small job in `folder`: prompts in prompts.parquet, output in out, 16 x 16 images, shards of 4."""
    if rows is None:
        rows = [{"prompt": f"image {number}"} for number in range(10)]
    uri = str(write_prompts(folder / "prompts.parquet", rows))
    tree: dict[str, dict[str, Any]] = {
        "prompts": {"uri": uri},
        "output": {"uri": str(folder / "out"), "shard_size": 4},
        "model": {"uri": "demo"},
        "sampling": {"width": 16, "height": 16, "num_inference_steps": 2},
        "workers": {"max": 2, "num_cpus": 0, "batch_size": 2},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return JobConfig.from_dict(tree)


def write_job(config: JobConfig, path: Path) -> Path:
    """Write `config` as a job file."""
    path.write_text(config.to_yaml())
    return path


def data_files(output: Path) -> dict[str, bytes]:
    """Read all files that readers of the data set see: train/ and metadata/."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for part in ("train", "metadata")
        for path in sorted((output / part).rglob("*"))
        if path.is_file()
    }


def metadata(config: JobConfig) -> list[dict[str, Any]]:
    """Read all metadata rows of a run, in order."""
    from flux_batch.output.metadata import unpack_metadata

    store = Store(config.output.uri, config.output.storage_options)
    return [row for key in store.list("metadata") for row in unpack_metadata(store.read(key))]
