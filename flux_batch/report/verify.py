"""The proof of a run: every committed shard is read again and held against its commit, its plan and itself.

Memory is bounded by the shards that are read at once, one image of each. Repair takes broken commits back, under the
lease of the run; `run` then makes what is missing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import get_args

from flux_batch.output.gc import find_leftovers
from flux_batch.output.paths import REPORT, SUCCESS, TRAIN, failed_file
from flux_batch.output.revert import finish_reverts, revert
from flux_batch.report.progress import duration
from flux_batch.report.saved_run import SavedRun
from flux_batch.report.verify_shard import Check, Problem, ShardCheck, ShardFindings, mended_failures
from flux_batch.storage.scratch import scratch_folder
from flux_batch.storage.store import Store

READERS = 8
# Of thousands of problems the first say what happened.
SHOWN = 50


@dataclass(slots=True)
class Verdict:
    """What was read of a run, and what is wrong with it."""

    output: str
    num_shards: int
    quick: bool
    is_complete: bool = False  # or so _SUCCESS says
    num_committed: int = 0
    num_files: int = 0
    num_rows: int = 0
    num_images: int = 0
    num_failed: int = 0
    num_bytes: int = 0
    wall_s: float = 0.0
    leftovers: Counter[str] = field(default_factory=Counter)  # by kind
    problems: list[Problem] = field(default_factory=list)

    @property
    def broken(self) -> list[int]:
        """List the shards whose commits do not hold what they promise."""
        return sorted({p.shard for p in self.problems if p.shard is not None and p.check in BREAKING})

    @property
    def exit_code(self) -> int:
        """0 all is well; 3 something is wrong."""
        return 3 if self.problems else 0

    def add(self, found: ShardFindings) -> None:
        """Count a shard."""
        self.num_committed += 1
        self.num_files += found.num_files
        self.num_rows += found.num_rows
        self.num_images += found.num_images
        self.num_failed += found.num_failed
        self.num_bytes += found.num_bytes
        self.problems += found.problems


# What makes a commit worthless; the rest can be mended around it.
BREAKING: tuple[Check, ...] = ("commit", "files", "rows", "images")


def verify(
    store: Store, *, quick: bool = False, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Verdict:
    """Read every committed shard again; `quick` compares sizes and tables, and reads no image.

    `on_progress` is told how many of how many shards are read. Changes nothing, and may run beside a run.
    Raises: JobError if there is no run, StoreError.
    """
    started = time.monotonic()
    run = SavedRun.open(store)
    verdict = Verdict(store.uri, run.num_shards, quick, is_complete=store.exists(SUCCESS))
    done = run.commits.done()
    sizes = store.children(TRAIN)
    shards = sorted(shard for shard in done if shard < run.num_shards)

    def check(shard: int) -> ShardFindings | None:
        with scratch_folder() as scratch:
            return ShardCheck(run, shard, scratch, sizes, quick)()

    for number, found in enumerate(_in_parallel(check, shards), 1):
        if found is not None:
            verdict.add(found)
        on_progress(number, len(shards))
    _check_whole(run, verdict, done)
    verdict.wall_s = time.monotonic() - started
    return verdict


def repair(store: Store, verdict: Verdict) -> list[int]:
    """Take back the commits that are broken, and mend what lies around the others; needs the lease.

    Returns: the shards that `run` has to make again; the good images of them are kept.
    """
    run = SavedRun.open(store)
    broken = verdict.broken
    finish_reverts(run.folder, run.output_format)
    revert(run.folder, run.output_format, broken)
    for shard in {p.shard for p in verdict.problems if p.check == "failed rows" and p.shard is not None} - {*broken}:
        if failures := mended_failures(run, shard):
            store.write(failed_file(run.name(shard)), failures)
        else:
            store.delete(failed_file(run.name(shard)))
    if verdict.is_complete and len(run.commits.done()) < run.num_shards:
        for key in (SUCCESS, REPORT):
            store.delete(key)
    return broken


def format_verdict(verdict: Verdict) -> str:
    """Lay a verdict out for people."""
    counts = Counter(problem.check for problem in verdict.problems)
    read = {
        "commit": f"{verdict.num_committed} of {verdict.num_shards} shards",
        "files": f"{verdict.num_files} files, {verdict.num_bytes / 1e6:.1f} MB",
        "rows": f"{verdict.num_rows} images, {verdict.num_failed} failed",
        "images": "not read (--quick)" if verdict.quick else f"{verdict.num_images} images",
        "failed rows": f"{verdict.num_failed} rows",
        "leftovers": ", ".join(f"{number} {kind}" for kind, number in sorted(verdict.leftovers.items())) or "none",
    }
    lines = [f"{verdict.output}: read in {duration(verdict.wall_s)}", f"{'check':<12} {'read':<36} problems"]
    lines += [f"{check:<12} {read[check]:<36} {counts[check] or '-'}" for check in get_args(Check)]
    lines += [_line(problem) for problem in verdict.problems[:SHOWN]]
    if len(verdict.problems) > SHOWN:
        lines.append(f"... and {len(verdict.problems) - SHOWN} more")
    if verdict.broken:
        lines.append(f"BROKEN: {len(verdict.broken)} shards; --repair takes their commits back, then run the job again")
    elif not verdict.problems:
        missing = verdict.num_shards - verdict.num_committed
        lines.append("all is well" + (f"; {missing} shards are not committed yet" if missing else ""))
    return "\n".join(lines)


def _line(problem: Problem) -> str:
    return f"{'run' if problem.shard is None else f'shard {problem.shard}'}: {problem.check}: {problem.text}"


def _check_whole(run: SavedRun, verdict: Verdict, done: set[int]) -> None:
    """Look at what is not about one shard that is done: missing ones, foreign ones, and what no commit names."""
    for shard in sorted(shard for shard in done if shard >= run.num_shards):
        verdict.problems.append(Problem("commit", f"{shard}: the plan has {run.num_shards} shards"))
    leftovers = list(find_leftovers(run.folder))
    late = run.commits.done() - done  # committed while we read
    if verdict.is_complete and len(done | late) < run.num_shards:
        missing = run.num_shards - len(done | late)
        verdict.problems.append(Problem("commit", f"{missing} shards are not committed, though {SUCCESS} is there"))
    for leftover in leftovers:
        if leftover.kind == "uncommitted" and leftover.shard in late:
            continue
        verdict.leftovers[leftover.kind] += 1
        # While a run is under way, all but a stray object are of use to it, or soon removed by it.
        if leftover.kind == "stray" or verdict.is_complete:
            verdict.problems.append(
                Problem("leftovers", f"{leftover.key}: {leftover.kind}; `flux-batch gc` removes it")
            )


def _in_parallel(
    function: Callable[[int], ShardFindings | None], shards: Iterable[int]
) -> Iterator[ShardFindings | None]:
    """Yield the results in order, with few shards on their way: a run may have hundreds of thousands."""
    waiting = iter(shards)
    with ThreadPoolExecutor(READERS, "verify") as pool:
        queue: list[Future[ShardFindings | None]] = [pool.submit(function, one) for one in islice(waiting, 2 * READERS)]
        while queue:
            yield queue.pop(0).result()
            queue += [pool.submit(function, one) for one in islice(waiting, 1)]
