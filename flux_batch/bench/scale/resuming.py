"""The benchmark of opening a run of many commits, with and without their log."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flux_batch.output.commit_log import CommitLog, check_all_committed
from flux_batch.output.commits import Commits
from flux_batch.output.paths import COMMIT_LOG, COMMITS, RunFolder
from flux_batch.records import Commit, StoredFile
from flux_batch.storage.store import Store

_IMAGES_A_SHARD = 256


def bench_resume(num_commits: int) -> dict[str, Any]:
    """Measure reading the state of a run on this disk: from every commit, from the log, and the check at its end."""
    with tempfile.TemporaryDirectory(prefix="flux-batch-bench-") as folder:
        _write_commits(Path(folder), num_commits)
        commits = Commits(RunFolder(Store(folder), num_commits))
        seconds = {}
        for name in ("commits", "log"):
            started = time.perf_counter()
            found = CommitLog.read(commits)
            seconds[name] = time.perf_counter() - started
            found.write()
            assert len(found.shards) == num_commits
        started = time.perf_counter()
        check_all_committed(commits)
        seconds["check"] = time.perf_counter() - started
        return {
            "benchmark": "resume",
            "commits": num_commits,
            "log_bytes": commits.run.store.size(COMMIT_LOG),
            "seconds": seconds,
        }


def format_resume(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    seconds = figures["seconds"]
    return (
        f"{figures['commits']} commits, a log of {figures['log_bytes']} bytes\n"
        f"every commit read  {seconds['commits']:.4g} s\n"
        f"the log read       {seconds['log']:.4g} s\n"
        f"all listed         {seconds['check']:.4g} s"
    )


def _write_commits(folder: Path, num_commits: int) -> None:
    """Write commits as a run leaves them, without waiting for the disk."""
    run = RunFolder(Store(str(folder)), num_commits)
    (folder / COMMITS).mkdir(parents=True)
    for shard in range(num_commits):
        name = run.shard_name(shard)
        files = tuple(
            StoredFile(path=path, bytes=10**8 + shard, sha256=f"{shard * 7919:064x}")
            for path in (f"train/{name}.tar", f"metadata/{name}.parquet")
        )
        failures = {"InvalidRow": 1} if shard % 100 == 0 else {}
        commit = Commit(
            shard=shard,
            worker="node-1234",
            num_images=_IMAGES_A_SHARD,
            num_failed=len(failures),
            files=files,
            failures=failures,
            device_s=round(300 + shard % 977 / 7, 3),
        )
        body = json.dumps({"version": 1, **asdict(commit)}, indent=1)
        (folder / COMMITS / f"{name}.json").write_text(body)
