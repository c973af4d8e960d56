"""The state of a shard while it is made: requested images, finished ones, and those left.

This module knows tasks, records and the staging area, but not how images are computed or how a shard is published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from flux_batch.config.schema import OutputConfig
from flux_batch.errors import DeviceFatal
from flux_batch.images import encode, encode_source
from flux_batch.output.formats import source_path
from flux_batch.output.paths import image_key
from flux_batch.output.staging import StagedImage, Staging, is_repair, retry_of, staged_record
from flux_batch.prompts.input_images import spilled
from flux_batch.records import Attempt, FailedRow, ImageRecord, ImageRequest, Shard
from flux_batch.telemetry import ShardCount
from flux_batch.worker.batches import ImageTask, batches, tasks_of, with_sources
from flux_batch.worker.generate import ImageOutcome
from flux_batch.worker.recorder import Recorder, message_of, provenance

# Objects of the staging area that are read at the same time; each holds the images of a batch.
_STAGED_READERS = 8
# An image fails once this many workers were lost while they made only this image.
_MAX_LOSSES_ALONE = 2


@dataclass(frozen=True, slots=True)
class _PlannedBatch:
    """Tasks to be made together; `label` names them in marks, alike in every attempt at the shard."""

    label: str
    tasks: list[ImageTask]


class ShardRun:
    """One attempt at a shard: `records` by (row, image index), and local encoded files, `images`, by key.

    After a worker was lost on the shard, batches are isolated: each is marked as started, and is staged before the next
    begins. A mark that remains shows a batch that killed its worker: its images are made last, one at a time. An image
    whose own mark has remained twice fails.
    """

    def __init__(
        self,
        shard: Shard,
        attempt: Attempt,
        recorder: Recorder,
        staging: Staging,
        output: OutputConfig,
        scratch: Path,
        *,
        retry_failed: bool = False,
    ) -> None:
        """Begin an attempt without rows; `scratch` is an empty local folder, which the caller removes.

        retry_failed: make images again that failed in earlier attempts.
        """
        self.index = shard.index
        self.name = staging.run.shard_name(shard.index)
        self.scratch = scratch
        self.records: dict[tuple[int, int], ImageRecord] = {}
        self.images: dict[str, Path] = {}
        self._attempt = attempt
        self._recorder = recorder
        self._staging = staging
        self._output = output
        self._retry_failed = retry_failed
        self._tasks: dict[str, ImageTask] = {}  # by key
        self._begun: set[tuple[int, int]] = set()  # positions that this attempt makes itself
        self._own_objects: set[str] = set()  # in the staging area
        self._seen_objects: set[str] = set()
        self._losses: Counter[str] = Counter()  # by label: marks of lost workers
        self.scores: dict[tuple[int, int], float | None] = {}
        self._retry = 0
        # True if adopted images are made once more in the batches of missing ones, which gives the same last bits.
        self._is_repair = False

    @property
    def num_tasks(self) -> int:
        """The number of images that the valid rows request."""
        return len(self._tasks)

    @property
    def is_retry(self) -> bool:
        """True if it makes further tries of images with low scores."""
        return self._retry > 0

    @property
    def count(self) -> ShardCount:
        """The numbers of images requested and done so far."""
        records = self.records.copy()
        requested = {task.position for task in self._tasks.values()}
        errors = Counter(record.error_type or "" for record in records.values() if record.status == "failed")
        adopted = requested & records.keys() - self._begun
        return ShardCount(len(requested | records.keys()), len(records), len(adopted), dict(errors))

    @property
    def is_isolated(self) -> bool:
        """True once workers were lost on this shard: the next loss must show its batch."""
        return self._attempt.lost > 0 or bool(self._losses)

    def ordered_records(self) -> list[ImageRecord]:
        """Return the records in input order."""
        return [self.records[position] for position in sorted(self.records)]

    @property
    def tasks(self) -> list[ImageTask]:
        """The images that the valid rows request."""
        return list(self._tasks.values())

    def key(self, task: ImageTask) -> str:
        """Return the key of an image; the key of a further try ends with the number of the try."""
        key = image_key(self.name, task.request.row, task.image_index)
        return f"{key}.{task.retry}" if task.retry else key

    def again(self, tasks: Iterable[ImageTask]) -> ShardRun:
        """Return an attempt that makes the next tries of some images, staged beside this one."""
        run = ShardRun(
            Shard(index=self.index, parts=()),
            self._attempt,
            self._recorder,
            self._staging,
            self._output,
            self.scratch,
            retry_failed=self._retry_failed,
        )
        run._retry = self._retry + 1
        run._tasks = {run.key(task): task for task in (replace(task, retry=run._retry) for task in tasks)}
        return run

    def add(self, row: ImageRequest | FailedRow) -> None:
        """Add a row; write the bytes of its images to disk, since those of a shard may not fit into memory."""
        row = with_sources(row, self._output.sources)
        if isinstance(row, FailedRow):
            self.records[row.row, 0] = self._recorder.failed_row(self.name, row)
            return
        row = replace(row, images=row.images.map(lambda image: spilled(image, self.scratch)))
        self._tasks |= {self.key(task): task for task in tasks_of(row)}

    def adopt_staged(self) -> None:
        """Adopt the images staged by earlier attempts, after all rows were added."""
        staged = self._staging.list(self.index)
        self._losses = staged.tries
        if self._retry_failed and self._attempt == Attempt():  # later attempts have marks of this invocation
            self._forget_repeated_losses()
        self._is_repair = any(is_repair(name) for name in staged.objects)
        self._adopt(self._of_this_try(staged.objects))
        if not self._attempt.reverse_order:  # otherwise a mark may belong to the other worker, which is alive
            self._fail_repeated_losses()

    def queue(self, size: int) -> list[_PlannedBatch]:
        """Return the batches that are left to make, in order.

        Batches are formed from all tasks, made or not, so that an image is batched with the same others as in an
        undisturbed run. Images that may have killed a worker come last and alone, when all others are safe.
        """
        whole: list[_PlannedBatch] = []
        isolated: list[_PlannedBatch] = []
        for number, tasks in enumerate(batches(self._tasks.values(), size)):
            label = f"b{number}.{self._retry}" if self._retry else f"b{number}"
            left = [task for task in tasks if task.position not in self.records]
            alone = [_PlannedBatch(self.key(task), [task]) for task in left]
            if self._losses[label] or any(self._losses[batch.label] for batch in alone):
                isolated += alone
            elif left:
                together = [task for task in tasks if not self._has_failed(task)] if self._is_repair else left
                whole += [_PlannedBatch(label, together)] if len(together) > 1 else alone
        if self._attempt.reverse_order:
            whole.reverse()
        return whole + sorted(isolated, key=lambda batch: self._losses[batch.label])

    def begin(self, batch: _PlannedBatch) -> list[ImageTask]:
        """Begin a batch. Returns: its tasks, except those adopted from another attempt meanwhile.

        In a repair the adopted ones are made too, since they belong to the batch; see `missing`.
        """
        tasks = [task for task in batch.tasks if task.position not in self.records]
        self._begun |= {task.position for task in tasks}
        return batch.tasks if tasks and self._is_repair else tasks

    def missing(self, outcomes: Sequence[ImageOutcome]) -> Sequence[ImageOutcome]:
        """Return the outcomes whose images are missing; the others were only made to complete the batch."""
        return [outcome for outcome in outcomes if outcome.task.position not in self.records]

    @contextmanager
    def marked(self, batch: _PlannedBatch, worker: str) -> Iterator[None]:
        """Mark a batch as started while the block runs, if batches are isolated.

        The mark of a lost process remains.
        """
        if not self.is_isolated:
            yield
            return
        mark = self._staging.mark_started(self.index, batch.label, worker)
        try:
            yield
        except DeviceFatal:
            raise  # this process ends, so the mark must remain as that of a lost worker
        except BaseException:
            self._staging.unmark(mark)
            raise
        self._staging.unmark(mark)

    def encode(self, outcome: ImageOutcome) -> StagedImage:
        """Encode one image to a local file and record it; runs on an encoder thread."""
        fields = self._recorder.outcome_fields(self.name, outcome)
        position = outcome.task.position
        if isinstance(outcome.result, Exception):
            error_type, error_message = type(outcome.result).__name__, message_of(outcome.result)
            self.records[position] = self._recorder.failed(fields, error_type, error_message)
            reason = {"error_type": error_type, "error_message": error_message}
            return StagedImage(self.key(outcome.task), staged_record(fields | reason), b"")
        data = encode(outcome.result, self._output.image, provenance(fields))
        images = outcome.task.sources if self._output.sources else ()
        sources = tuple(encode_source(image, self._output.image) for image in images)
        self._write_image(self.key(outcome.task), data, sources)
        self.records[position] = self._recorder.made(self.name, fields, data, sources)
        self.scores[position] = outcome.score
        score = {} if outcome.score is None else {"score": outcome.score}
        return StagedImage(self.key(outcome.task), staged_record(fields) | score, data, sources)

    def stage(self, encoded: Sequence[Future[StagedImage]]) -> None:
        """Stage a batch once its images are encoded.

        The last batch is staged too, since the next shard begins before the commit.
        """
        name = self._staging.put(self.index, [image.result() for image in encoded], retry=self._retry)
        self._own_objects.add(name)
        self._seen_objects.add(name)

    def adopt_others(self) -> bool:
        """Adopt the images that another attempt at the shard has staged meanwhile.

        Returns: False if objects that this attempt staged are gone, since another attempt has committed the shard.
        """
        own = self._own_objects.copy()
        staged = self._staging.list(self.index)
        if any(self._is_wanted(task) for task in self._tasks.values()):
            self._adopt(self._of_this_try(staged.objects) - self._seen_objects)
        return own <= staged.objects

    def clean(self) -> None:
        """Remove staged objects after the commit; makes no request if none were staged.

        Another worker on the same shard removes its own objects.
        """
        if self.is_isolated or self._attempt.reverse_order:
            self._staging.remove(self.index)
        else:
            self._staging.discard(self.index, self._seen_objects)

    def image_of(self, position: tuple[int, int]) -> Path:
        """Return the encoded local file of a made image."""
        key = image_key(self.name, *position)
        return self.images[f"{key}.{self._retry}" if self._retry else key]

    def _of_this_try(self, objects: Iterable[str]) -> set[str]:
        return {name for name in objects if retry_of(name) == self._retry}

    def _has_failed(self, task: ImageTask) -> bool:
        record = self.records.get(task.position)
        return record is not None and record.status == "failed"

    def _is_wanted(self, task: ImageTask) -> bool:
        return task.position not in self._begun and task.position not in self.records

    def _adopt(self, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(_STAGED_READERS, "adopt") as readers:
            failed = [image for some in readers.map(self._adopt_made, sorted(names)) for image in some]
        for image in failed:  # after the made ones: a later attempt may have made an image that failed before
            self._adopt_image(image)

    def _adopt_made(self, name: str) -> list[StagedImage]:
        """Adopt the made images of a staged object. Returns: the failed ones, unless they are retried."""
        self._seen_objects.add(name)
        failed = []
        for image in self._staging.read(self.index, name):
            if image.data:
                self._adopt_image(image)
            elif not self._retry_failed:
                failed.append(image)
        return failed

    def _adopt_image(self, image: StagedImage) -> None:
        """Adopt an image that is still needed and has the same row and settings."""
        task = self._tasks.get(image.key)
        if task is None or not self._is_wanted(task):
            return
        record = dict(image.record)
        if task.request.size_from_reference:
            task = task.sized(record["width"], record["height"])
        if task.request.guidance_from_model:
            task = task.guided(record["embedded_guidance"])
        error = record.pop("error_type", ""), record.pop("error_message", "")
        score = record.pop("score", None)
        truncated = record.get("clip_truncated"), record.get("t5_truncated")
        fields = self._recorder.fields(self.name, task, record.get("tile_size"), truncated)
        if staged_record(fields) != record or (image.data and len(image.sources) != self._output.sources):
            return
        if image.data:
            self._write_image(image.key, image.data, image.sources)
            self.scores[task.position] = score
            self.records[task.position] = self._recorder.made(self.name, fields, image.data, image.sources)
        else:
            self.records[task.position] = self._recorder.failed(fields, *error)

    def _forget_repeated_losses(self) -> None:
        """Remove the marks of images that would fail because of too many lost workers."""
        labels = {key for key in self._tasks if self._losses[key] >= _MAX_LOSSES_ALONE}
        if labels:
            self._staging.forget_losses(self.index, labels)
        for key in labels:
            del self._losses[key]

    def _fail_repeated_losses(self) -> None:
        """Record images as failed if too many workers were lost while making them alone."""
        for key, task in self._tasks.items():
            losses = self._losses[key]
            if losses >= _MAX_LOSSES_ALONE and task.position not in self.records:
                last = f"; the last: {self._attempt.reason}" if self._attempt.reason else ""
                reason = f"{losses} workers were lost while they made this image alone{last}"
                fields = self._recorder.fields(self.name, task)
                self.records[task.position] = self._recorder.failed(fields, "WorkerLost", reason)

    def _write_image(self, key: str, data: bytes, sources: Sequence[bytes]) -> None:
        path = self.scratch / key
        path.write_bytes(data)
        for name, source in zip(self._output.source_names, sources, strict=True):
            source_path(path, name).write_bytes(source)
        self.images[key] = path
