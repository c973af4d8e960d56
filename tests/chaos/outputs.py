"""Reads the output of a run: in a form to compare two runs of one job, and as its readers count it."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from flux_batch.config.schema import JobConfig
from flux_batch.errors import JobError
from flux_batch.output.staging import Staging
from flux_batch.report.saved_run import SavedRun
from flux_batch.report.verify import format_verdict, verify
from flux_batch.storage.store import Store

# The fields of a report that do not depend on the time and the speed of the run.
OF_REPORT = ("name", "num_shards", "num_committed", "num_images", "num_failed", "errors")

# The fields of a commit that depend on its worker and on time.
OF_WORKER = ("worker", "device_s", "started_unix_time", "finished_unix_time", "stage_s", "attempt", "num_lost")


@dataclass(frozen=True)
class Found:
    """The counts of a reader: missing images that could be made, and images that exist more than once."""

    lost: int
    doubled: int
    failed: dict[str, tuple[str, str]]  # by prompt: type and message


def store_of(config: JobConfig) -> Store:
    return Store(config.output.uri, config.output.storage_options)


def keys_of(store: Store) -> list[str]:
    """List every object of an output."""
    within = [key for folder in ("train", "metadata", "_run") for key in store.list(folder)]
    return sorted([*within, *(name for name, size in store.children("").items() if size is not None)])


def contents(config: JobConfig) -> dict[str, Any]:
    """Read every object in a comparable form, without workers, times and addresses."""
    store = store_of(config)
    return {
        key: _comparable(key, store.read(key), config)
        for key in keys_of(store)
        if not key.startswith("_run/lease/")  # depends on how often the run changed its driver
    }


def _comparable(key: str, data: bytes, config: JobConfig) -> Any:
    if key.startswith("_run/commits/"):
        return {name: value for name, value in json.loads(data).items() if name not in OF_WORKER}
    if key == "_run/report.json":
        return {name: value for name, value in json.loads(data).items() if name in OF_REPORT}
    if key == "_run/commit_log.parquet":
        return pq.read_table(io.BytesIO(data)).drop_columns("device_s").to_pylist()
    if key == "_run/progress.json":
        return None
    if key in ("_run/job.yaml", "README.md"):
        return data.replace(config.output.uri.encode(), b"OUTPUT")
    return data


def kept(config: JobConfig) -> set[str]:
    """List the prompts with staged or committed images, which no kill can lose."""
    try:
        run = SavedRun.open(store_of(config))
    except JobError:
        return set()
    staging = Staging(run.folder)
    # Staging first: an image that is committed meanwhile is seen at least once.
    staged = [
        image.record["prompt"]
        for shard in staging.shards()
        for name in staging.list(shard).objects
        for image in staging.read(shard, name)
    ]
    return {*staged, *(row["prompt"] for shard in run.commits.done() for row in run.metadata(shard))}


def read_back(config: JobConfig, wanted: Counter[str], scratch: Path) -> Found:
    """Read a complete run by its commits, as a reader does, and compare it with the wanted prompts."""
    run = SavedRun.open(store_of(config))
    scratch.mkdir(parents=True, exist_ok=True)
    there: Counter[str] = Counter()
    failed: dict[str, tuple[str, str]] = {}
    for shard in range(run.num_shards):
        stored = Counter(key for key, _ in run.images(shard, scratch))
        for row in run.metadata(shard):
            there[row["prompt"]] += stored.pop(row["key"], 0)
            if row["status"] == "failed":
                failed[row["prompt"]] = (row["error_type"], row["error_message"])
        there["in no row"] += stored.total()
    return Found((wanted - there).total(), (there - wanted).total(), failed)


def assert_verified(config: JobConfig) -> None:
    verdict = verify(store_of(config))
    assert verdict.is_complete
    assert verdict.exit_code == 0, format_verdict(verdict)
