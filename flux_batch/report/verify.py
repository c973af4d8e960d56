"""The verification of a run: every committed shard is read again and compared with its commit and the plan.

Memory is bounded by the number of shards read at once, with one image of each. `repair` reverts broken commits, under
the lease of the run; `run` then makes the missing shards again.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar, get_args

from flux_batch.errors import NotFound, StoreError, bytes_text, count_of, one_line
from flux_batch.output.annotations import AnnotationFolder, annotation_names, unpack_annotations
from flux_batch.output.commit_log import CommitLog
from flux_batch.output.commits import parse_commit
from flux_batch.output.formats import DECODE_ERRORS
from flux_batch.output.gc import Listing, find_leftovers, logged_shards
from flux_batch.output.paths import REPORT, SUCCESS, failed_file, metadata_file, number_in
from flux_batch.output.revert import finish_reverts, revert
from flux_batch.report.progress.snapshot import duration
from flux_batch.report.saved_run import SavedRun
from flux_batch.report.verify_shard import Check, Problem, ShardFindings, check_shard, rebuild_failures
from flux_batch.storage.scratch import scratch_folder
from flux_batch.storage.store import Store

_SHARDS_AT_ONCE = 8
# The number of problems to list: the first of thousands show what happened.
_MAX_LISTED = 50

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


@dataclass(slots=True)
class _Verdict:
    """The counts of a verified run, and its problems."""

    output: str
    num_shards: int
    quick: bool
    is_complete: bool = False  # _SUCCESS exists
    num_committed: int = 0
    num_files: int = 0
    num_rows: int = 0
    num_images: int = 0
    num_failed: int = 0
    num_bytes: int = 0
    num_annotations: int = 0  # files
    wall_s: float = 0.0
    leftovers: Counter[str] = field(default_factory=Counter)  # by kind
    problems: list[Problem] = field(default_factory=list)
    broken_annotations: list[tuple[str, int]] = field(default_factory=list)  # names and shards

    @property
    def broken(self) -> list[int]:
        """The shards that differ from their commits, in order."""
        return sorted({p.shard for p in self.problems if p.shard is not None and p.check in _BREAKING})

    @property
    def exit_code(self) -> int:
        """The exit code: 0 without a problem, else 3."""
        return 3 if self.problems else 0

    def add(self, found: ShardFindings) -> None:
        """Add the findings of a shard."""
        self.num_committed += 1
        self.num_files += found.num_files
        self.num_rows += found.num_rows
        self.num_images += found.num_images
        self.num_failed += found.num_failed
        self.num_bytes += found.num_bytes
        self.problems += found.problems


# Problems for which a commit is reverted; other problems are repaired without that.
_BREAKING: tuple[Check, ...] = ("commit", "files", "rows", "images")


def verify(
    store: Store, *, quick: bool = False, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> _Verdict:
    """Read every committed shard again and return the problems. Nothing is changed; a run may be active meanwhile.

    quick: read no images. Listed sizes are compared with the log of commits; commit and table are read only for a shard
    that differs, is not in the log, or has a folder of images. on_progress: gets the numbers of shards read and of all.
    Raises: JobError if there is no run, StoreError.

    >>> verdict = verify(Store("out/done"))
    >>> verdict.num_images, verdict.problems
    (10, [])
    """
    started = time.monotonic()
    run = SavedRun.open(store)
    verdict = _Verdict(store.uri, run.num_shards, quick, is_complete=store.exists(SUCCESS))
    commits = run.commits.listed()
    listing = Listing.of(run.folder, run.output_format, commits) if quick else None
    is_logged = _add_logged(run, verdict, listing) if listing else bytearray(run.num_shards)
    to_read = array("i", (shard for shard in commits if not is_logged[shard]))

    def check(shard: int) -> ShardFindings | None:
        with scratch_folder() as scratch:
            return check_shard(run, shard, scratch, listing.data if listing else None)

    for number, found in enumerate(_in_parallel(check, to_read), 1):
        if found is not None:
            verdict.add(found)
        on_progress(number, len(to_read))
    _check_annotations(run, verdict, commits)
    verdict.is_complete &= store.exists(SUCCESS)  # checked again: a command that reverts shards removes it first
    # Checked last: while the shards are read, other files may appear and disappear.
    _check_whole(run, verdict, listing or Listing.of(run.folder, run.output_format, commits), is_logged)
    verdict.wall_s = time.monotonic() - started
    return verdict


def _add_logged(run: SavedRun, verdict: _Verdict, listing: Listing) -> bytearray:
    """Add the counts of shards whose files agree with the log. Returns: 1 for each, which need not be read."""
    log, _ = CommitLog.saved(run.commits)
    is_logged = logged_shards(run.folder, listing, log)
    for shard, num_bytes, num_images, num_failed in zip(
        log.shards, log.num_bytes, log.num_images, log.num_failed, strict=True
    ):
        if is_logged[shard]:
            verdict.num_files += 1 + (num_images > num_failed)
            verdict.num_rows += num_images
            verdict.num_failed += num_failed
            verdict.num_bytes += num_bytes
    verdict.num_committed += sum(is_logged)
    verdict.num_images += verdict.num_rows - verdict.num_failed
    return is_logged


def repair(store: Store, verdict: _Verdict) -> list[int]:
    """Revert the broken commits, and rebuild the copies of failed rows of other shards; needs the lease.

    Broken annotations are reverted too: `annotate` makes them again.
    Returns: the shards that `run` has to make again; their good images are kept.
    """
    run = SavedRun.open(store)
    broken = verdict.broken
    finish_reverts(run.folder, run.output_format)
    revert(run.folder, run.output_format, broken, is_repair=True)
    for name, shard in verdict.broken_annotations:
        AnnotationFolder(run.folder, name).revert(shard)
    for shard in {p.shard for p in verdict.problems if p.check == "failed rows" and p.shard is not None} - {*broken}:
        if failures := rebuild_failures(run, shard):
            store.write(failed_file(run.name(shard)), failures)
        else:
            store.delete(failed_file(run.name(shard)))
    if verdict.is_complete and len(run.commits.done()) < run.num_shards:
        for key in (SUCCESS, REPORT):
            store.delete(key)
    return broken


def format_verdict(verdict: _Verdict) -> str:
    """Return a verdict as a table and a list of problems for people."""
    counts = Counter(problem.check for problem in verdict.problems)
    read = {
        "commit": f"{verdict.num_committed} of {count_of(verdict.num_shards, 'shard')}",
        "files": f"{count_of(verdict.num_files, 'file')}, {bytes_text(verdict.num_bytes)}",
        "rows": f"{count_of(verdict.num_rows, 'image')}, {verdict.num_failed} failed",
        "images": "not read (--quick)" if verdict.quick else count_of(verdict.num_images, "image"),
        "failed rows": count_of(verdict.num_failed, "row"),
        "annotations": count_of(verdict.num_annotations, "file"),
        "leftovers": ", ".join(f"{number} {kind}" for kind, number in sorted(verdict.leftovers.items())) or "none",
    }
    took = duration(verdict.wall_s) if verdict.wall_s >= 1 else "under 1 s"
    lines = [f"{verdict.output}: read in {took}", f"{'check':<12} {'read':<36} problems"]
    lines += [f"{check:<12} {read[check]:<36} {counts[check] or '-'}" for check in get_args(Check)]
    lines += [_line(problem) for problem in verdict.problems[:_MAX_LISTED]]
    if len(verdict.problems) > _MAX_LISTED:
        lines.append(f"... and {len(verdict.problems) - _MAX_LISTED} more")
    if verdict.broken:
        lines.append(
            f"BROKEN: {count_of(len(verdict.broken), 'shard')}; --repair reverts their commits, then run the job again"
        )
    if verdict.broken_annotations:
        names = ", ".join(sorted({name for name, _ in verdict.broken_annotations}))
        lines.append(f"BROKEN: annotations of {names}; --repair reverts their commits, then run `annotate` again")
    if not verdict.problems:
        missing = verdict.num_shards - verdict.num_committed
        lines.append("all is well" + (f"; not committed yet: {count_of(missing, 'shard')}" if missing else ""))
    return "\n".join(lines)


def _line(problem: Problem) -> str:
    return f"{'run' if problem.shard is None else f'shard {problem.shard}'}: {problem.check}: {problem.text}"


def _check_annotations(run: SavedRun, verdict: _Verdict, shards: Container[int]) -> None:
    """Compare the annotations of committed shards with their commits, and their keys with the images'."""
    for name in annotation_names(run.folder):
        folder = AnnotationFolder(run.folder, name)

        def check(shard: int, folder: AnnotationFolder = folder) -> tuple[int, str]:
            return shard, _annotation_problem(run, folder, shard)

        for shard, problem in _in_parallel(check, sorted(shard for shard in folder.commits.done() if shard in shards)):
            verdict.num_annotations += 1
            if problem:
                verdict.problems.append(Problem("annotations", problem, shard))
                verdict.broken_annotations.append((name, shard))


def _annotation_problem(run: SavedRun, folder: AnnotationFolder, shard: int) -> str:
    """Return the problem of an annotation file; "" if there is none, or if it is made again meanwhile.

    Raises: StoreError for an outage.
    """
    key = folder.commits.key(shard)
    data, images = run.store.find(key), run.store.find(run.commits.key(shard))
    problem = "" if data is None or images is None else _problem_of_file(run, folder, shard, data, images)
    return problem if problem and run.store.find(key) == data else ""


def _problem_of_file(run: SavedRun, folder: AnnotationFolder, shard: int, data: bytes, images: bytes) -> str:
    """Return the problem of an annotation file. data, images: the commits of annotations and images."""
    path, metadata = folder.file(shard), metadata_file(run.name(shard))
    try:
        commit = parse_commit(data)
        rows = run.store.read(path)
        num_rows = len(unpack_annotations(rows))
        of_images = {file.path: file.sha256 for file in parse_commit(images).files}
    except StoreError as error:
        if not isinstance(error, NotFound):
            raise
        return f"{path}: is missing"
    except DECODE_ERRORS as error:
        return f"{path}: cannot be read: {one_line(error)}"
    files = {file.path: file.sha256 for file in commit.files}
    if files.get(path) != hashlib.sha256(rows).hexdigest():
        return f"{path}: the bytes differ from those that were committed (sha256)"
    if files.get(metadata) != of_images.get(metadata):
        return f"{path}: is about other images than those of the shard"
    return "" if num_rows == commit.num_images else f"{path}: has {num_rows} rows; {commit.num_images} were committed"


def _check_whole(run: SavedRun, verdict: _Verdict, listing: Listing, is_logged: bytearray) -> None:
    """Check the run as a whole: missing shards, unknown shards, and files that no commit names.

    is_logged: 1 for each shard whose files agree with the log of commits.
    """
    numbers = (number_in(name, ".json") for name, size in listing.commits.others.items() if size is not None)
    for shard in sorted(number for number in numbers if number is not None and number >= run.num_shards):
        verdict.problems.append(
            Problem("commit", f"shard {shard} is committed, but the plan has {count_of(run.num_shards, 'shard')}")
        )
    leftovers = list(find_leftovers(run.folder, listing, is_logged))
    missing = list(listing.commits.missing) if verdict.is_complete else []
    # Commits that were written in the meantime.
    late = run.commits.listed() if missing or any(each.kind == "uncommitted" for each in leftovers) else ()
    if num_missing := sum(shard not in late for shard in missing):
        lacks = f"{count_of(num_missing, 'commit')} missing, though {SUCCESS} is there"
        verdict.problems.append(Problem("commit", lacks))
    for leftover in leftovers:
        if leftover.kind == "uncommitted" and leftover.shard is not None and leftover.shard in late:
            continue
        verdict.leftovers[leftover.kind] += 1
        # An active run needs all leftovers except stray files, or soon removes them itself.
        if leftover.kind == "stray" or verdict.is_complete:
            verdict.problems.append(
                Problem("leftovers", f"{leftover.key}: {leftover.kind}; `flux-batch gc` removes it")
            )


def _in_parallel(function: Callable[[_Item], _Found], shards: Iterable[_Item]) -> Iterator[_Found]:
    """Yield the results in order, with only a few shards queued: a run may have hundreds of thousands."""
    waiting = iter(shards)
    with ThreadPoolExecutor(_SHARDS_AT_ONCE, "verify") as pool:
        queue: list[Future[_Found]] = [pool.submit(function, one) for one in islice(waiting, 2 * _SHARDS_AT_ONCE)]
        while queue:
            yield queue.pop(0).result()
            queue += [pool.submit(function, one) for one in islice(waiting, 1)]
