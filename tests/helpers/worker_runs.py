"""Runs jobs by a worker in this process, and reads the images and rows that it wrote."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from flux_batch.config.schema import JobConfig
from flux_batch.plan.plan import Plan, make_plan
from flux_batch.records import ShardResult
from flux_batch.worker.worker import Worker, WorkerFactory
from helpers.fakes import FakePipeline, make_fake_pipeline

FORMATS = ["webdataset", "files", "parquet"]


def make_job(tmp_path: Path, rows: Sequence[dict[str, Any] | str], **sections: Any) -> JobConfig:
    """Write rows (or bare prompts) as Parquet, and a job of 64 x 48 images for them."""
    rows = [{"prompt": row} if isinstance(row, str) else row for row in rows]
    names = {name: None for row in rows for name in row}
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path, row_group_size=3)
    tree: dict[str, Any] = {
        "prompts": {"uri": str(path)},
        "output": {"uri": str(tmp_path / "out"), "shard_size": 4},
        "model": {"uri": "fake"},
        "sampling": {"width": 64, "height": 48, "num_inference_steps": 3},
        "workers": {"batch_size": 3},
    }
    return JobConfig.from_dict({key: tree.get(key, {}) | sections.get(key, {}) for key in {**tree, **sections}})


def open_worker(config: JobConfig, pipeline: FakePipeline | None = None) -> tuple[Worker, Plan]:
    plan = make_plan(config.prompts, config.output.shard_size)
    factory = WorkerFactory(config, len(plan.shards), plan.passthrough, make_fake_pipeline)
    return Worker(factory, pipeline or FakePipeline()), plan


def render(config: JobConfig, pipeline: FakePipeline | None = None) -> list[ShardResult]:
    """Run every shard of a job in this process."""
    worker, plan = open_worker(config, pipeline)
    results = [worker.make(shard).finish() for shard in plan.shards]
    return results


def metadata(config: JobConfig) -> list[dict[str, Any]]:
    files = sorted(Path(config.output.uri, "metadata").iterdir())
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def images(config: JobConfig) -> dict[str, bytes]:
    """Return every image file of a run by its key, read without the code under test."""
    train = Path(config.output.uri, "train")
    found: dict[str, bytes] = {}
    for path in sorted(train.rglob("*")):
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                members = [member for member in tar if not member.name.endswith((".txt", ".json"))]
                found |= {member.name.partition(".")[0]: tar.extractfile(member).read() for member in members}
        elif path.name == "metadata.parquet":
            continue
        elif path.suffix == ".parquet":
            rows = pq.read_table(path, columns=["key", "image"]).to_pylist()
            found |= {row["key"]: row["image"]["bytes"] for row in rows}
        elif path.is_file():
            found[path.stem] = path.read_bytes()
    return found


def files_of(config: JobConfig, *folders: str) -> dict[str, bytes]:
    root = Path(config.output.uri)
    paths = [path for folder in folders for path in (root / folder).rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def pixels_of(data: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)
