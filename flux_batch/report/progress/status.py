"""The status of a run, read only from its output: while it runs or after its driver died, from any machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flux_batch.errors import DamagedObject, JobError, NotFound, count_of
from flux_batch.output.annotations import AnnotationFolder, annotation_names
from flux_batch.output.commit_log import CommitLog
from flux_batch.output.commits import Commits
from flux_batch.output.lease import Holder, read_holder
from flux_batch.output.paths import PLAN, PRECISION, PROGRESS, SUCCESS, RunFolder
from flux_batch.plan.plan import Outline
from flux_batch.records import Kernels
from flux_batch.report.progress.snapshot import Snapshot, duration
from flux_batch.report.saved_run import read_json
from flux_batch.report.summary import Totals, failure_lines, first_failures
from flux_batch.storage.store import Store

# Seconds between two readings while watching.
_WATCH_S = 5.0
_STATES = {
    "complete": "complete",
    "running": "running",
    "starting": "starting: a driver has the run, and has reported nothing yet",
    "dead": "dead: its driver gives no sign of life; run the same command, it takes over and goes on",
    "stopped": "stopped: run the same command to go on",
}
_COUNTS = ("num_shards", "num_committed", "num_images", "num_failed")


def read_status(store: Store, now: float | None = None) -> dict[str, Any]:
    """Read the counts, the failures and the driver of a run. Raises: JobError if there is no run in the output.

    >>> status = read_status(Store("out/done"))
    >>> status["state"], status["num_images"], status["failures"]
    ('complete', 10, {})
    """
    return _Reader.open(store).read(now)


def statuses(store: Store) -> Iterator[dict[str, Any]]:
    """Yield the status of a run repeatedly until it is complete; each commit is read only once."""
    reader = _Reader.open(store)
    while True:
        status = reader.read()
        yield status
        if status["is_complete"]:
            return
        time.sleep(_WATCH_S)


@dataclass
class _Reader:
    """A reader of a run's status; later readings read only new commits."""

    run: RunFolder
    outline: Outline
    commit_log: CommitLog | None = None
    examples: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, store: Store) -> _Reader:
        """Read the plan of a run. Raises: JobError if there is none; DamagedObject."""
        try:
            outline = Outline.from_parquet(store.read(PLAN))
        except NotFound as error:
            raise JobError(f"{store.uri}: there is no run here (no {PLAN})") from error
        except ValueError as error:
            raise DamagedObject(f"{store.url(PLAN)} is damaged: {error}") from error
        return cls(RunFolder(store, len(outline.num_rows)), outline)

    def read(self, now: float | None = None) -> dict[str, Any]:
        """Read the current status. now: in seconds since 1970."""
        store, run = self.run.store, self.run
        is_complete = store.exists(SUCCESS)  # read first: if it exists, everything else exists
        holder = read_holder(store)
        if self.commit_log is None:
            self.commit_log = CommitLog.read(Commits(run))
        else:
            self.commit_log.update()
        totals = Totals.of(self.commit_log)
        self.examples |= first_failures(self.commit_log, set(self.examples))
        progress = read_json(store, PROGRESS)
        state = "complete" if is_complete else _state_of(holder, progress, time.time() if now is None else now)
        return {
            "output": store.uri,
            "state": state,
            "stopped_by": _stopped_by(holder, progress) if state == "stopped" else "",
            "num_prompts": sum(self.outline.num_rows),
            "num_shards": run.num_shards,
            "num_committed": totals.num_committed,
            "num_images": totals.num_images,
            "num_failed": totals.num_failed,
            "num_annotated": {name: len(AnnotationFolder(run, name).commits.done()) for name in annotation_names(run)},
            "is_complete": is_complete,
            "failures": dict(totals.failures.most_common()),
            "examples": {kind: self.examples[kind] for kind in totals.failures if kind in self.examples},
            "progress": progress,
            "precision": read_json(store, PRECISION),
            "driver": None if holder is None else _driver(holder),
        }


def format_status(status: Mapping[str, Any], now: float | None = None, price: float | None = None) -> str:
    """Return a status as lines for people. price: of a GPU hour."""
    return "\n".join(f"{name:<8} {text}" for name, text in status_rows(status, now, price))


def watch_status(
    store: Store, price: float | None, write: Callable[[str], None], draw: Callable[..., None] | None = None
) -> None:
    """Watch a run until it is complete.

    write: gets a line whenever something has changed, and the whole status at the end. draw: gets the figures and their
    rows, in place of the lines.
    """
    said = ""
    for status in statuses(store):
        now = _figures(status)
        if draw is not None:
            draw(now, status_rows(status, None, price))
        elif (line := f"{status['state']}: {replace(now, elapsed_s=0.0).line(price)}{_after(status)}") != said:
            said = line
            write(line)
    write(format_status(status, price=price))


def _after(status: Mapping[str, Any]) -> str:
    return f"; {status['stopped_by']}" if status["stopped_by"] else ""


def status_rows(
    status: Mapping[str, Any], now: float | None = None, price: float | None = None
) -> list[tuple[str, str]]:
    """Return a status as rows of a table. price: of a GPU hour."""
    now = time.time() if now is None else now
    committed, shards = status["num_committed"], status["num_shards"]
    rows = [
        ("output", status["output"]),
        ("prompts", str(status["num_prompts"])),
        ("shards", f"{committed} of {shards} committed ({100 * committed / shards if shards else 100:.0f} %)"),
        ("images", f"{status['num_images']} committed, {status['num_failed']} of them failed"),
        *(("" if number else "failed", line) for number, line in enumerate(failure_lines(status))),
        *_progress_rows(status, now, price),
    ]
    if precision := status["precision"]:
        kernels = Kernels.of_record(precision)
        rows.append(("computes", f"in {precision.get('dtype')}" + (f", on {kernels}" if kernels else "")))
    if annotated := status["num_annotated"]:
        each = ", ".join(f"{name} {number}" for name, number in annotated.items())
        rows.append(("columns", f"{each} of {count_of(shards, 'shard')} annotated"))
    by = status["stopped_by"]
    rows.append(("state", f"stopped: {by}" if by else _STATES[status["state"]]))
    if status["driver"] and not status["is_complete"]:
        rows.append(("driver", _driver_line(status["driver"], now)))
    return rows


def _progress_rows(status: Mapping[str, Any], now: float, price: float | None) -> list[tuple[str, str]]:
    """Return the last report of the driver and its age."""
    if not status["progress"]:
        return [] if status["is_complete"] else [("report", "none yet")]
    last = _figures(status)
    compute = [("compute", last.compute_text(price))] if last.device_hours else []
    if status["is_complete"]:
        return [*([("speed", last.speed_text)] if last.images_per_s else []), *compute]
    age = duration(max(0.0, now - last.unix_time))
    parts = [last.images_text, last.speed_text, last.workers_text] if not last.waiting_for else [last.images_text]
    rows = [("report", f"last report {age} ago: {', '.join(parts)}")]
    if last.waiting_for:
        rows.append(("waiting", f"for {last.waiting_for}"))
    return rows + compute


def _figures(status: Mapping[str, Any]) -> Snapshot:
    """Return the figures of a status: committed ones from the commits, the rest from the driver's last report."""
    last = Snapshot.from_json({**dict.fromkeys(_COUNTS, 0), **(status["progress"] or {})})
    is_live = status["state"] == "running"
    # Uncommitted images of an ended driver may be staged, but only a live driver knows their number.
    num_staged = max(0, last.num_images + last.num_staged - status["num_images"]) if is_live else 0
    expected = last.num_expected if last.num_expected is not None else status["num_prompts"]
    return replace(
        last,
        **{name: status[name] for name in _COUNTS},
        num_staged=num_staged,
        num_expected=None if status["is_complete"] else expected,
        failures={**status["failures"], **last.failures} if is_live else status["failures"],
        waiting_for=last.waiting_for if is_live else "",
        eta_s=None if status["is_complete"] else last.eta_s,
        workers_up=last.workers_up if is_live else 0,
        workers_starting=last.workers_starting if is_live else 0,
        busy_share=last.busy_share if is_live else None,
    )


def _state_of(holder: Holder | None, progress: Mapping[str, Any] | None, now: float) -> str:
    """Return the state of an incomplete run, by its lease.

    The age of the last heartbeat compares the clocks of two machines; for a driver on this machine, its process is
    checked.
    """
    if holder is None or holder.is_released:
        return "stopped"
    if holder.process.is_gone() or now - holder.seen_unix_time > holder.ttl_s:
        return "dead"
    return "running" if _has_reported(holder, progress) else "starting"


def _stopped_by(holder: Holder | None, progress: Mapping[str, Any] | None) -> str:
    """Return why the last driver ended before the run, and how to continue; "" if it did not report that."""
    if holder is None or progress is None or not _has_reported(holder, progress):
        return ""
    return str(progress.get("stopped_by", ""))


def _has_reported(holder: Holder, progress: Mapping[str, Any] | None) -> bool:
    """Return whether the last report is by this driver."""
    return progress is not None and progress.get("unix_time", 0) >= int(holder.since_unix_time)


def _driver(holder: Holder) -> dict[str, Any]:
    return {
        "name": str(holder),
        "epoch": holder.epoch,
        "is_at_work": not holder.is_released,
        "since_unix_time": holder.since_unix_time,
        "seen_unix_time": holder.seen_unix_time,
        "ttl_s": holder.ttl_s,
    }


def _driver_line(driver: Mapping[str, Any], now: float) -> str:
    """Return a line about the driver; its ages compare the clocks of two machines, so they are for people only."""
    if not driver["is_at_work"]:
        return f"none; the last was {driver['name']}"
    seen_s = max(0.0, now - driver["seen_unix_time"])
    line = (
        f"{driver['name']} for {duration(max(0.0, now - driver['since_unix_time']))}, "
        f"last sign of life {duration(seen_s)} ago"
    )
    return line if seen_s <= driver["ttl_s"] else f"{line}: it seems to be gone; `run` takes over"
