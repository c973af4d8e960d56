"""The benchmark of a run with many commits: opening it with and without their log, its status, closing it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from flux_batch.bench.figures import number, table
from flux_batch.bench.machine import measured
from flux_batch.bench.scale.driver import one_file
from flux_batch.config.schema import JobConfig
from flux_batch.output.commit_log import CommitLog, check_all_committed
from flux_batch.output.commits import Commits
from flux_batch.output.paths import (
    COMMIT_LOG,
    COMMITS,
    FAILED,
    JOB,
    METADATA,
    PLAN,
    SUCCESS,
    TRAIN,
    RunFolder,
    commit_file,
    failed_file,
    metadata_file,
)
from flux_batch.plan.plan import Plan
from flux_batch.records import Commit, StoredFile
from flux_batch.report.progress.status import read_status
from flux_batch.report.verify import verify
from flux_batch.storage.store import Store

_IMAGES_A_SHARD = 256
_FAILED_EVERY = 100
# Images and tables are hard links to a sparse file of this size; a file has at most 65,000 links (ext4).
_FILE_BYTES, _LINKS = 10**6, 20_000


def bench_resume(num_commits: int) -> dict[str, Any]:
    """Measure a whole run on this disk, with empty images and tables."""
    with tempfile.TemporaryDirectory(prefix="flux-batch-bench-") as folder:
        store = Store(folder)
        commits = Commits(RunFolder(store, num_commits))
        _write_run(Path(folder), commits.run)
        looks: dict[str, Callable[[], object]] = {
            "every commit read": lambda: _read_log(commits),
            "the log read": lambda: _read_log(commits),
            "status": lambda: read_status(store),
            "verify --quick": lambda: _verify(store),
            "closed: all listed": lambda: check_all_committed(commits),
        }
        figures = {name: measured(look) for name, look in looks.items()}
        return {
            "benchmark": "resume",
            "commits": num_commits,
            "log_bytes": store.size(COMMIT_LOG),
            **{
                what: {name: each[what] for name, each in figures.items()}
                for what in ("seconds", "cpu_seconds", "memory_bytes")
            },
        }


def format_resume(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    head = ("", "seconds", "CPU seconds", "memory, MB")
    rows = [
        (name, number(seconds), number(figures["cpu_seconds"][name]), f"{figures['memory_bytes'][name] / 1e6:.0f}")
        for name, seconds in figures["seconds"].items()
    ]
    return f"{figures['commits']} commits, a log of {figures['log_bytes']} bytes\n{table([head, *rows])}"


def _read_log(commits: Commits) -> None:
    """Read all commits, or their log, and write the log as the driver does."""
    found = CommitLog.read(commits)
    found.write()
    assert len(found.shards) == commits.run.num_shards


def _verify(store: Store) -> None:
    verdict = verify(store, quick=True)
    assert not verdict.problems, verdict.problems[:3]


def _write_run(folder: Path, run: RunFolder) -> None:
    """Write the output of a run with empty tables and images. It does not wait for the disk."""
    for name in (COMMITS, FAILED, METADATA, TRAIN):
        (folder / name).mkdir(parents=True)
    config = JobConfig.from_dict(
        {"prompts": {"uri": str(folder / "prompts.parquet")}, "output": {"uri": str(folder)}, "model": {"uri": "demo"}}
    )
    plan = Plan(shards=one_file(run.num_shards, _IMAGES_A_SHARD), files=(), passthrough=pa.schema([]))
    run.store.write(JOB, config.to_yaml().encode())
    run.store.write(PLAN, plan.to_parquet())
    for shard in range(run.num_shards):
        name = run.shard_name(shard)
        files = tuple(
            StoredFile(path=path, bytes=_FILE_BYTES, sha256=f"{shard * 7919:064x}")
            for path in (f"{TRAIN}/{name}.tar", metadata_file(name))
        )
        failures = {"InvalidRow": 1} if shard % _FAILED_EVERY == 0 else {}
        commit = Commit(
            shard=shard,
            worker="node-1234",
            num_images=_IMAGES_A_SHARD,
            num_failed=len(failures),
            files=files,
            failures=failures,
            device_s=round(300 + shard % 977 / 7, 3),
        )
        (folder / commit_file(name)).write_text(json.dumps({"version": 1, **asdict(commit)}, indent=1))
        hole = folder / f"hole-{shard // _LINKS}"
        if not shard % _LINKS:
            hole.touch()
            os.truncate(hole, _FILE_BYTES)
        for path in [*(file.path for file in files), *([failed_file(name)] if failures else [])]:
            os.link(hole, folder / path)
    run.store.write(SUCCESS, b"")
