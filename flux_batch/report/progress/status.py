"""The status of a run, read from its output alone: while it runs, after it died, from any machine."""

from __future__ import annotations

import time
from typing import Any

from flux_batch.errors import JobError, NotFound
from flux_batch.output.annotations import AnnotationFolder, annotation_names
from flux_batch.output.commit_log import CommitLog
from flux_batch.output.commits import Commits
from flux_batch.output.lease import Holder, read_holder
from flux_batch.output.paths import PLAN, PRECISION, PROGRESS, SUCCESS, RunFolder
from flux_batch.plan.plan import Outline
from flux_batch.records import Kernels
from flux_batch.report.progress.snapshot import duration
from flux_batch.report.saved_run import read_json
from flux_batch.report.summary import Totals
from flux_batch.storage.store import Store


def read_status(store: Store) -> dict[str, Any]:
    """Read the counts and the driver of a run. Raises: JobError if there is no run in the output."""
    try:
        num_rows = Outline.from_parquet(store.read(PLAN)).num_rows
    except NotFound as error:
        raise JobError(f"{store.uri}: there is no run here (no {PLAN})") from error
    run = RunFolder(store, len(num_rows))
    totals = Totals.of(CommitLog.read(Commits(run)))
    holder = read_holder(store)
    return {
        "output": store.uri,
        "num_prompts": sum(num_rows),
        "num_shards": len(num_rows),
        "num_committed": totals.num_committed,
        "num_images": totals.num_images,
        "num_failed": totals.num_failed,
        "num_annotated": {name: len(AnnotationFolder(run, name).commits.done()) for name in annotation_names(run)},
        "is_complete": store.exists(SUCCESS),
        "progress": read_json(store, PROGRESS),
        "precision": read_json(store, PRECISION),
        "driver": None if holder is None else _driver(holder),
    }


def format_status(status: dict[str, Any], now: float | None = None) -> str:
    """Return a status as lines for people."""
    now = now if now is not None else time.time()
    committed, shards = status["num_committed"], status["num_shards"]
    share = 100 * committed / shards if shards else 100.0
    lines = [
        f"output   {status['output']}",
        f"prompts  {status['num_prompts']}",
        f"shards   {committed} of {shards} committed ({share:.0f} %)",
        f"images   {status['num_images']} committed, {status['num_failed']} of them failed",
    ]
    if precision := status["precision"]:
        kernels = Kernels.of_record(precision)
        lines.append(f"computes in {precision.get('dtype')}" + (f", on {kernels}" if kernels else ""))
    if annotated := status["num_annotated"]:
        each = ", ".join(f"{name} {number}" for name, number in annotated.items())
        lines.append(f"columns  {each} of {shards} shards annotated")
    if status["is_complete"]:
        lines.append("state    complete")
    elif progress := status["progress"]:
        age_s = now - progress["unix_time"]
        eta = f", {duration(progress['eta_s'])} left at that time" if progress["eta_s"] else ""
        lines.append(f"state    last report {duration(age_s)} ago: {progress['images_per_s']:.2f} images/s{eta}")
    else:
        lines.append("state    no progress reported yet")
    if status["driver"] and not status["is_complete"]:
        lines.append(f"driver   {_driver_line(status['driver'], now)}")
    return "\n".join(lines)


def _driver(holder: Holder) -> dict[str, Any]:
    return {
        "name": str(holder),
        "epoch": holder.epoch,
        "is_at_work": not holder.is_released,
        "since_unix_time": holder.since_unix_time,
        "seen_unix_time": holder.seen_unix_time,
        "ttl_s": holder.ttl_s,
    }


def _driver_line(driver: dict[str, Any], now: float) -> str:
    """Return a line on the driver; its ages compare the clocks of two machines, so they are for people only."""
    if not driver["is_at_work"]:
        return f"none; the last was {driver['name']}"
    seen_s = max(0.0, now - driver["seen_unix_time"])
    line = (
        f"{driver['name']} for {duration(max(0.0, now - driver['since_unix_time']))}, "
        f"last sign of life {duration(seen_s)} ago"
    )
    return line if seen_s <= driver["ttl_s"] else f"{line}: it seems to be gone; `run` takes over"
