"""The summary of a run: counts, rates, versions, and the exit code for schedulers."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from html import escape
from typing import Any

from flux_batch.errors import NotFound, count_of
from flux_batch.output.commit_log import CommitLog
from flux_batch.output.metadata import unpack_metadata
from flux_batch.output.paths import FAILED, METADATA, TRAIN, failed_file
from flux_batch.records import Commit, Kernels, ShardResult

# The number of failure reasons to list, and the length of an example in characters.
_MAX_REASONS, _MAX_EXAMPLE = 5, 300
_RUN_PACKAGES = ("flux-batch", "torch", "transformers", "ray", "pillow")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """The totals of a run over all invocations, and the work of the last one. Times in seconds."""

    name: str
    output: str
    num_shards: int
    num_committed: int
    num_images: int  # requested images in committed shards, failed ones included
    num_failed: int
    num_new_images: int  # made by this invocation
    num_workers: int  # workers that committed a shard in this invocation
    wall_s: float
    device_s: float
    max_failed_ratio: float
    failures: dict[str, int] = field(default_factory=dict)  # of all failed images, by error type
    images_per_s: float = 0.0  # of this invocation, from its first shard on
    device_hours: float = 0.0  # hours of workers with their GPUs, or of workers without GPU, over all invocations
    device_s_of_run: float = 0.0  # busy time of all pipelines, over all invocations
    num_gpus: float = 0.0  # of a worker
    model: dict[str, Any] = field(default_factory=dict)
    kernels: Kernels | None = None  # of the first worker
    versions: dict[str, str | None] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)  # the first image of each error type, and its reason
    errors: tuple[str, ...] = ()  # of the first thousand finally failed shards

    @property
    def is_complete(self) -> bool:
        """True if every shard is committed."""
        return self.num_committed == self.num_shards

    @property
    def failed_ratio(self) -> float:
        """The share of the requested images that failed."""
        return self.num_failed / self.num_images if self.num_images else 0.0

    @property
    def exit_code(self) -> int:
        """The exit code: 0 done; 1 shards finally failed; 3 finished, but more rows failed than allowed."""
        if not self.is_complete:
            return 1
        return 3 if self.failed_ratio > self.max_failed_ratio else 0

    @property
    def line(self) -> str:
        """The result of the run in one line."""
        made = "nothing done now"
        if self.num_new_images:
            made = f"{self.num_new_images} done now, by {count_of(self.num_workers, 'worker')} in {self.wall_s:.1f} s"
        num_missing = self.num_shards - self.num_committed
        left = "" if self.is_complete else f"; {count_of(num_missing, 'shard')} missing"
        good = count_of(self.num_images - self.num_failed, "image")
        return f"{self.name}: {good}, {self.num_failed} failed; {made}{left}"

    def _repr_html_(self) -> str:
        """Return the report as a table, for a notebook."""
        rows = {
            "images": f"{self.num_images}, {self.num_failed} of them failed",
            **{f"failed: {error_type}": str(number) for error_type, number in self.failures.items()},
            "shards": f"{self.num_committed} of {self.num_shards} committed",
            "made now": f"{self.num_new_images} in {self.wall_s:.1f} s, {self.images_per_s:.3g} images/s",
            "output": self.output,
            **{f"error {number}": error for number, error in enumerate(self.errors, start=1)},
        }
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
        return f"<table><caption>{escape(self.name)}: exit code {self.exit_code}</caption>{cells}</table>"

    def to_json(self) -> bytes:
        """Return the report as JSON, for the next stage."""
        fields = asdict(self) | {
            "gpu_s_of_run": round(self.device_s_of_run * self.num_gpus, 3),
            "is_complete": self.is_complete,
            "exit_code": self.exit_code,
        }
        return json.dumps(fields, indent=1).encode()


def report_rows(report: RunReport) -> list[tuple[str, str]]:
    """Return the result of a finished run as rows of a table."""
    reasons = failure_lines({"failures": report.failures, "examples": report.examples})
    rows = [
        ("run", report.line),
        ("images", f"{report.output}/{TRAIN}"),
        ("metadata", f"{report.output}/{METADATA}"),
        *(("" if number else "failed", line) for number, line in enumerate(reasons)),
    ]
    if not report.is_complete:
        rows.append(("MISSING", "the run is not complete: run it again"))
    elif report.exit_code:
        allowed = (
            f"{100 * report.failed_ratio:.1f} % failed, failures.max_ratio = {report.max_failed_ratio:g} allows less; "
            f"all reasons are in {report.output}/{FAILED}"
        )
        rows.append(("TOO MANY", allowed))
    return rows


@dataclass(slots=True)
class Totals:
    """Running sums over commits and results."""

    num_committed: int = 0
    num_images: int = 0
    num_failed: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    device_s: float = 0.0

    @classmethod
    def of(cls, commits: CommitLog) -> Totals:
        """Return the sums of commits."""
        return cls(
            len(commits.shards),
            sum(commits.num_images),
            sum(commits.num_failed),
            commits.all_failures,
            math.fsum(commits.device_s),
        )

    def add(self, done: Commit | ShardResult) -> None:
        """Add one committed shard."""
        self.num_committed += 1
        self.num_images += done.num_images
        self.num_failed += done.num_failed
        self.failures.update(done.failures)
        self.device_s += done.device_s


def first_failures(counts: CommitLog, known: Collection[str] = ()) -> dict[str, str]:
    """Return key and message of the first failed image of the most frequent error types.

    Error types in `known`, and those whose rows cannot be read, are left out.
    """
    run = counts.commits.run
    first: dict[str, int] = {}
    for shard, failures in counts.failures.items():
        for error_type in failures:
            first[error_type] = min(shard, first.get(error_type, shard))
    examples: dict[str, str] = {}
    for error_type, _ in counts.all_failures.most_common(_MAX_REASONS):
        if error_type in known:
            continue
        try:
            rows = unpack_metadata(run.store.read(failed_file(run.shard_name(first[error_type]))))
        except (NotFound, ValueError, OSError):  # damaged, which `verify` reports: the run must not fail
            continue
        row = next((each for each in rows if each["error_type"] == error_type), None)
        if row is not None:
            examples[error_type] = f"{row['key']}: {row['error_message']}"
    return examples


def failure_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return the most frequent `failures` as lines, each with its first image from `examples`."""
    lines = []
    for error_type, number in Counter(figures["failures"]).most_common(_MAX_REASONS):
        example = figures["examples"].get(error_type, "")[:_MAX_EXAMPLE]
        lines.append(f"{number} {error_type}" + (f", first {example}" if example else ""))
    return lines


def installed_versions(packages: Iterable[str] = _RUN_PACKAGES) -> dict[str, str | None]:
    """Return the versions of Python and of `packages`, without importing these; None for a missing package."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    return versions | {name: _installed_version(name) for name in packages}


@cache  # takes 10 ms, and installed versions do not change for a running process
def _installed_version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
