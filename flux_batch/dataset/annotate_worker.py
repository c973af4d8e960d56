"""The worker of an annotation pass: it reads a shard's images once and calls every annotator on them.

Each annotator gets its own file and commit. The work has the two halves of every worker: `make` ends with the last row,
`finish` publishes the rows.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any

from flux_batch.config.running import FailuresConfig
from flux_batch.dataset.annotate_shard import ImageBatch, ShardAnnotation, read_batches
from flux_batch.dataset.annotators.load import AnnotatorSpec, OpenAnnotator, open_annotator
from flux_batch.errors import AlreadyExists, DamagedObject, FluxBatchError, NotFound, PlanMismatch, Stopped
from flux_batch.output.annotations import AnnotationFolder
from flux_batch.records import Attempt, Commit, Shard, ShardResult
from flux_batch.redaction import public_tree
from flux_batch.report.saved_run import SavedRun
from flux_batch.storage.retry import RetryPolicy, WorkerStop
from flux_batch.storage.scratch import scratch_folder, sweep_scratch
from flux_batch.storage.store import Store
from flux_batch.telemetry import LOADING, Heartbeat, Metrics, ShardCount

log = logging.getLogger(__name__)

# The number of threads that decode the next batch while annotators work on the current one.
_DECODERS = 4
_FIRST_ATTEMPT = Attempt()


@dataclass(frozen=True, kw_only=True)
class AnnotateFactory:
    """The settings of a worker. Its pickle is small, since models are loaded later, on the worker."""

    output: str
    storage_options: Mapping[str, Any]
    specs: tuple[AnnotatorSpec, ...]
    batch_size: int
    failures: FailuresConfig

    def open(self) -> AnnotateWorker:
        """Open the annotators and check their identity against existing annotations. Raises: JobError, PlanMismatch."""
        sweep_scratch()
        run = SavedRun.open(Store(self.output, self.storage_options, RetryPolicy(self.failures.outage_s, LOADING.beat)))
        annotators = [open_annotator(spec) for spec in self.specs]
        for annotator in annotators:
            _settle_identity(AnnotationFolder(run.folder, annotator.spec.name), annotator.identity)
        return AnnotateWorker(self, run.config.name, annotators)


def _settle_identity(folder: AnnotationFolder, identity: Mapping[str, Any]) -> None:
    """Write the identity of an annotation's annotator. Raises: PlanMismatch if another annotator has begun it."""
    store = folder.run.store
    try:
        store.put_if_absent(folder.identity, json.dumps(identity, indent=1).encode())
    except AlreadyExists:
        check_identity(folder, read_identity(folder) or {}, identity)


def read_identity(folder: AnnotationFolder) -> dict[str, Any] | None:
    """Read the identity of an annotation's annotator; None if it was not begun. Raises: DamagedObject, StoreError."""
    store = folder.run.store
    try:
        saved = json.loads(store.read(folder.identity))
    except NotFound:
        return None
    except ValueError:
        saved = None
    if not isinstance(saved, dict) or not isinstance(saved.get("options"), dict):
        raise DamagedObject(f"{store.url(folder.identity)}: is damaged; make these annotations again, with --anew")
    return {**saved, "options": public_tree(saved["options"], "options")}  # the first versions stored secrets as given


def check_identity(folder: AnnotationFolder, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise PlanMismatch with every difference between the saved annotator and the requested one."""
    changed = [f"  {key}: {saved.get(key)!r} -> {now[key]!r}" for key in now if saved.get(key) != now[key]]
    if changed:
        raise PlanMismatch(
            f"{folder.run.store.uri}: the annotations {folder.name} were begun by another annotator; undo the change, "
            f"give these another name (--with NEW=...), or make all of them again (--anew):\n" + "\n".join(changed)
        )


class AnnotateWorker:
    """Open annotators and an output; it annotates one shard after the other."""

    def __init__(self, factory: AnnotateFactory, run_name: str, annotators: Sequence[OpenAnnotator]) -> None:
        self.metrics = Metrics(f"{run_name}:annotate")
        self._factory = factory
        self._annotators = annotators
        self._heartbeat = Heartbeat()
        self._stop = WorkerStop(factory.failures.drain_s)
        policy = self._stop.policy(factory.failures.outage_s, self._heartbeat.beat)
        self._run = SavedRun.open(Store(factory.output, factory.storage_options, policy))
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def make(self, shard: Shard, attempt: Attempt = _FIRST_ATTEMPT) -> _MadeAnnotations:
        """Annotate the images of a shard with every annotator that has not committed it.

        Raises: Stopped after stop(), when the finished rows are staged.
        """
        started = time.monotonic()
        with self._heartbeat.busy("make"):
            images = self._run.commits.read(shard.index)  # read first, so that `publish` sees later changes
            records = [row for row in self._run.metadata(shard.index) if row["status"] == "success"]
            folders = [AnnotationFolder(self._run.folder, one.spec.name) for one in self._annotators]
            todo = [
                ShardAnnotation(folder, annotator, shard.index, records, self._factory.batch_size, attempt)
                for folder, annotator in zip(folders, self._annotators, strict=True)
                if folder.commits.find(shard.index) is None
            ]
            try:
                self._annotate(shard.index, records, todo, attempt)
            except BaseException:
                self.metrics.put_down(shard.index)
                raise
            return _MadeAnnotations(self, images, todo, started)

    def stop(self) -> None:
        """Stop after the current batch, and annotate no other shard."""
        self._stop.request()

    def idle_s(self) -> float:
        """Return the seconds since the last progress; 0 while nothing is annotated."""
        return self._heartbeat.idle_s()

    def publish(self, images: Commit, todo: Sequence[ShardAnnotation]) -> list[Commit]:
        """Write the file and the commit of each annotation. Returns: the stored commits.

        images: the commit of the annotated images. Raises: FluxBatchError if they were made again meanwhile.
        """
        now = self._run.commits.find(images.shard)
        if now is None or now.files != images.files:
            raise FluxBatchError(
                f"{self._run.store.uri}: the images of shard {images.shard} were made again while they were annotated"
            )
        commits = []
        for annotation in todo:
            self._heartbeat.beat("finish")
            with self.metrics.timed("publish"):
                commits.append(annotation.publish(self._name, images))
        return commits

    def finishing(self) -> AbstractContextManager[None]:
        """Return a context in which the second half must report progress."""
        return self._heartbeat.busy("finish")

    def _annotate(
        self, shard: int, records: Sequence[Mapping[str, Any]], todo: Sequence[ShardAnnotation], attempt: Attempt
    ) -> None:
        """Make the missing rows: first whole batches, then the rows that may have killed a worker."""
        for one in todo:
            one.adopt_staged()
        num_adopted = min((len(one.rows) for one in todo), default=0)
        self.metrics.count_shard(shard, ShardCount(len(records), num_adopted, num_adopted))
        is_isolated = attempt.lost > 0 or any(one.has_losses for one in todo)
        for alone in (False, True) if any(one.has_suspects for one in todo) else (False,):
            with closing(self._batches(shard, records, todo, alone=alone)) as batches:
                for batch in batches:
                    self._annotate_batch(batch, todo, alone=alone, is_isolated=is_isolated)
                    num_done = min(len(one.rows) for one in todo)
                    self.metrics.count_shard(shard, ShardCount(len(records), num_done, num_adopted))
        for one in todo:
            one.stage()

    def _batches(
        self, shard: int, records: Sequence[Mapping[str, Any]], todo: Sequence[ShardAnnotation], *, alone: bool
    ) -> Generator[ImageBatch]:
        """Yield the batches with missing rows; each is decoded while the one before it is annotated."""
        if all(len(one.rows) == len(records) for one in todo):
            return
        size = 1 if alone else self._factory.batch_size
        with (
            scratch_folder() as scratch,
            ThreadPoolExecutor(1, "read") as reader,
            ThreadPoolExecutor(_DECODERS) as pool,
        ):
            batches = read_batches(self._run, shard, records, size, scratch)
            wanted = (batch.decoded(pool) for batch in batches if any(one.wants(batch, alone=alone) for one in todo))
            coming = reader.submit(next, wanted, None)
            while (batch := coming.result()) is not None:
                self._heartbeat.beat("make")
                coming = reader.submit(next, wanted, None)
                yield batch

    def _annotate_batch(
        self, batch: ImageBatch, todo: Sequence[ShardAnnotation], *, alone: bool, is_isolated: bool
    ) -> None:
        for one in todo:
            if self._stop.is_requested:
                self._put_aside(todo)
            if one.wants(batch, alone=alone):
                with self.metrics.timed("make"):
                    num_failed = one.annotate(batch, self._name, alone=alone, is_isolated=is_isolated)
                self.metrics.add("images", len(batch.records) - num_failed.total())
                for error_type, number in num_failed.items():
                    self.metrics.add("failures", number, label=error_type)
                self._heartbeat.beat("make")

    def _put_aside(self, todo: Sequence[ShardAnnotation]) -> None:
        """Stage the finished rows, then raise Stopped."""
        for one in todo:
            one.stage()
        raise Stopped(f"shard {todo[0].name}: stopped with {sum(len(one.rows) for one in todo)} rows")


@dataclass(frozen=True)
class _MadeAnnotations:
    """A shard with finished rows. `finish` may run in another thread while the next shard is annotated."""

    worker: AnnotateWorker
    images: Commit
    todo: Sequence[ShardAnnotation]
    started: float

    def finish(self) -> ShardResult:
        """Publish and commit the rows of every annotator."""
        try:
            with self.worker.finishing():
                commits = self.worker.publish(self.images, self.todo)
        finally:
            self.worker.metrics.put_down(self.images.shard)
        metrics, num_bytes = self.worker.metrics, sum(commit.files[0].bytes for commit in commits)
        metrics.add("shards")
        metrics.add("bytes", num_bytes)
        failures: Counter[str] = Counter()
        for commit in commits:
            failures.update(commit.failures)
        return ShardResult(
            shard=self.images.shard,
            worker=commits[0].worker if commits else "",
            num_images=max((commit.num_images for commit in commits), default=0),
            num_failed=sum(commit.num_failed for commit in commits),
            num_bytes=num_bytes,
            failures=dict(failures),
            is_new=bool(commits),
            device_s=sum(one.seconds for one in self.todo),
            wall_s=time.monotonic() - self.started,
        )
