"""What a worker does with a shard: rows -> batches -> images -> files -> commit.

In two parts, so that the device need not wait for the storage: `make` ends with the last image, what it returns takes
the shard to its commit while the next one is made.

Knows prompts, records and storage; takes the pipeline as an argument and does not know what computes an image,
nor on which machine it runs.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.errors import NotFound, Stopped
from flux_batch.output.commits import Commits, Publisher
from flux_batch.output.layouts import layout_for
from flux_batch.output.staging import StagedImage, Staging
from flux_batch.prompts.input_images import load_image
from flux_batch.prompts.row_loras import RowLoras
from flux_batch.prompts.source import PromptSource
from flux_batch.records import Attempt, Commit, FailedRow, InputImage, Shard, ShardResult
from flux_batch.storage.scratch import scratch_folder, sweep_scratch
from flux_batch.storage.store import Store
from flux_batch.telemetry import Pulse, Tally
from flux_batch.worker.auto_batch_size import measured_batch_size, remembered_batch_size
from flux_batch.worker.batches import READ_AHEAD, InputImages
from flux_batch.worker.compile_cache import SharedCompileCache
from flux_batch.worker.generate import BatchMaker, Made, Tiles
from flux_batch.worker.lora_switch import LoraSwitch
from flux_batch.worker.protocol import ImagePipeline
from flux_batch.worker.recorder import Recorder, message_of
from flux_batch.worker.settled_precision import load_settled
from flux_batch.worker.shard import ShardRun

# Batches that may be on their way to the staging area while the next is made: what a kill can cost beside that one.
BATCHES_BEHIND = 1
# Threads that read input images; each may hold a large one before it is made smaller.
READERS = 4
FIRST = Attempt()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerRecipe:
    """How to make a worker, wherever it is to run: pickles small, is opened where the device is."""

    config: JobConfig
    num_shards: int
    passthrough: pa.Schema
    make_pipeline: Callable[[ModelConfig], ImagePipeline]

    def open(self) -> Worker:
        """Load the model and open the output, once the disk is free of what killed workers left."""
        sweep_scratch()
        output, failures = self.config.output, self.config.failures
        store = Store(output.uri, output.storage_options, patience_s=failures.outage_s)
        pipeline, model = load_settled(store, self.config.model, self.make_pipeline)
        return Worker(replace(self, config=self.config.model_copy(update={"model": model})), pipeline)


class Worker:
    """A pipeline with a way in and a way out: makes one shard after the other, and finishes one after the other."""

    def __init__(self, recipe: WorkerRecipe, pipeline: ImagePipeline) -> None:
        config = self._config = recipe.config
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._num_encoders = max(1, round(config.workers.num_cpus))
        self._making, self._finishing = Pulse(), Pulse()
        self.tally = Tally(config.name)
        self._stopping = threading.Event()
        self._source = PromptSource(config.prompts)
        self._pipeline = pipeline
        self._measured: int | None = None  # once it was asked for
        store = self._store = Store(
            config.output.uri,
            config.output.storage_options,
            patience_s=config.failures.outage_s,
            on_wait=self._beat,
        )
        self._compiled = SharedCompileCache(store, pipeline.compile_cache)
        self._staging = Staging(store, recipe.num_shards)
        self._commits = Commits(store, recipe.num_shards)
        layout = layout_for(config.output, recipe.passthrough)
        self._publisher = Publisher(self._commits, layout, recipe.passthrough, self._name)
        loras = LoraSwitch(pipeline, RowLoras(config.model.loras, "").of_job)
        sampling = config.sampling
        tiles = Tiles(sampling.tile_size, sampling.tile_stride) if sampling.tiled else None
        self._maker = BatchMaker(pipeline, loras, tiles, self._making.beat)
        self._recorder = Recorder(config.model, layout, pipeline.default_t5_sequence_length, loras.words)

    def make(self, shard: Shard, attempt: Attempt = FIRST) -> Callable[[], ShardResult]:
        """Make the images of a shard; one that is committed already is left as it is.

        Returns: what takes the shard to its commit. It may be called on another thread while the next shard is made.
        Raises: Stopped after stop(), with what was made in the staging area.
        """
        with self._making.at_work(), ExitStack() as held:
            started, device_s = time.monotonic(), self._maker.device_s
            if commit := self._committed(shard.index):
                return partial(_result, commit)
            run = self._take(shard, attempt, held.enter_context(scratch_folder()))
            ending = self._make(run, held)
            self._compiled.share()
            return partial(self._finish, run, ending, held.pop_all(), started, self._maker.device_s - device_s)

    def stop(self) -> None:
        """Put the shard that is made aside after the batch in hand, and take no other."""
        self._stopping.set()

    def quiet_s(self) -> float:
        """Tell how long ago what this worker makes or finishes last got on, in seconds; 0 while it has nothing."""
        return max(self._making.quiet_s(), self._finishing.quiet_s())

    def _finish(
        self, run: ShardRun, ending: Callable[[], Commit | None], held: ExitStack, started: float, device_s: float
    ) -> ShardResult:
        """Take a shard whose images are made to its commit."""
        with held, self._finishing.at_work():
            commit = ending() or self._publish(run, device_s)
            run.clean()
        self._count(commit)
        return replace(
            _result(commit),
            is_new=commit.worker == self._name,
            device_s=device_s,
            wall_s=time.monotonic() - started,
        )

    def _take(self, shard: Shard, attempt: Attempt, scratch: Path) -> ShardRun:
        """Read the rows of a shard, and what earlier attempts have left of it."""
        run = ShardRun(shard, attempt, self._recorder, self._staging, self._config.output.image, scratch)
        with self.tally.timed("read"):
            for row in self._source.read(shard, self._config.sampling, self._config.model.loras):
                run.add(row)
                if isinstance(row, FailedRow):
                    self.tally.add("failures", kind=row.error_type)
            run.adopt_staged()
        self._making.beat()
        return run

    def _make(self, run: ShardRun, held: ExitStack) -> Callable[[], Commit | None]:
        """Make all images of a shard. Returns: what waits until they are encoded and staged.

        That returns None, or the commit of whoever was first. While one batch is made, what the next starts from is
        read, the last is encoded and staged, and what other attempts at the shard have done is looked up.
        """
        queue = run.queue(self._batch_size())
        self._maker.expect([item for batch in queue for item in batch.items])
        behind: deque[Future[None]] = deque()
        looking: Future[Commit | None] | None = None
        encoders = held.enter_context(ThreadPoolExecutor(self._num_encoders, "encode"))
        stager = held.enter_context(ThreadPoolExecutor(1, "stage"))
        images = InputImages(held.enter_context(ThreadPoolExecutor(READERS, "read")), self._read_image)
        for number, batch in enumerate(queue):
            if self._stopping.is_set():
                _join(behind)
                if commit := self._committed(run.index):
                    return partial(self._ended, run, behind, commit)  # of another driver's worker
                raise Stopped(f"shard {run.name}: put aside with {len(run.images)} of {run.num_items} images")
            if looking and (commit := looking.result()):
                return partial(self._ended, run, behind, commit)
            if not (items := run.begin(batch)):
                continue
            if len(queue) > 1:
                looking = stager.submit(self._done_elsewhere, run)
            # Of a process that dies while it reads, the mark must name the batch that it was reading for.
            following = [] if run.is_careful else queue[number + 1 : number + 1 + READ_AHEAD]
            with run.announced(batch, self._name):
                with self.tally.timed("input"):
                    ready = images.join(items, [one.items for one in following])
                with self.tally.timed("make"):
                    made = self._maker.make(ready)
            self._count_made(run, made)
            encoded = [encoders.submit(self._encode, run, one) for one in made]
            behind.append(stager.submit(self._stage, run, encoded))
            with self.tally.timed("wait"):
                while len(behind) > (0 if run.is_careful else BATCHES_BEHIND):
                    behind.popleft().result()
        return partial(self._ended, run, behind, None, is_shared=len(queue) > 1)

    def _ended(
        self, run: ShardRun, behind: Iterable[Future[None]], commit: Commit | None, *, is_shared: bool = False
    ) -> Commit | None:
        """Wait for the last batches; look what other attempts at the shard have done, if there was time for any."""
        if commit:
            wait(behind)  # what is staged after a commit must not stay
            return commit
        _join(behind)
        return self._done_elsewhere(run) if is_shared else None

    def _batch_size(self) -> int:
        size = self._config.workers.batch_size
        if size == "auto":
            self._measured = self._measured or remembered_batch_size(self._store, self._measure)
            return self._measured
        return size

    def _measure(self) -> int:
        return measured_batch_size(self._pipeline, self._config.sampling, self._making.beat)

    def _read_image(self, image: InputImage, size: tuple[int, int]) -> Any:
        return load_image(image, self._config.prompts.storage_options, size)

    def _count_made(self, run: ShardRun, made: Sequence[Made]) -> None:
        """Count a batch whose images are on their way to the encoders and to the staging area."""
        errors = {run.key(one.item): one.outcome for one in made if isinstance(one.outcome, Exception)}
        self.tally.add("images", len(made) - len(errors))
        for key, error in errors.items():
            self.tally.add("failures", kind=type(error).__name__)
            about = {"run": self._config.name, "shard": run.index, "key": key}
            log.info("%s: %s", key, message_of(error), extra=about)
        self.tally.shift("encode_queue", len(made))
        self.tally.shift("stage_queue", 1)

    def _encode(self, run: ShardRun, made: Made) -> StagedImage:
        try:
            with self.tally.timed("encode"):
                return run.finish(made)
        finally:
            self.tally.shift("encode_queue", -1)

    def _stage(self, run: ShardRun, images: list[Future[StagedImage]]) -> None:
        try:
            with self.tally.timed("stage"):
                run.stage(images)
        finally:
            self.tally.shift("stage_queue", -1)
        self._beat()

    def _publish(self, run: ShardRun, device_s: float) -> Commit:
        self._finishing.beat()
        records = [run.records[place] for place in sorted(run.records)]
        with self.tally.timed("publish"):
            return self._publisher.publish(run.index, records, run.images, run.scratch, device_s)

    def _count(self, commit: Commit) -> None:
        if commit.worker == self._name:
            self.tally.add("shards")
            self.tally.add("bytes", sum(file.bytes for file in commit.files))
            about = {"run": self._config.name, "shard": commit.shard}
            log.info("shard %d: %d images, %d failed", commit.shard, commit.num_images, commit.num_failed, extra=about)

    def _beat(self) -> None:
        """Give a sign of progress that may be of the shard that is made or of the one that is finished."""
        self._making.beat()
        self._finishing.beat()

    def _done_elsewhere(self, run: ShardRun) -> Commit | None:
        """Look what other attempts at the shard have done; return the commit if one was first."""
        return None if run.look() else self._committed(run.index)

    def _committed(self, shard: int) -> Commit | None:
        with suppress(NotFound):
            return self._commits.read(shard)
        return None


def _join(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()


def _result(commit: Commit) -> ShardResult:
    return ShardResult(
        shard=commit.shard,
        worker=commit.worker,
        num_images=commit.num_images,
        num_failed=commit.num_failed,
        num_bytes=sum(file.bytes for file in commit.files),
        failures=commit.failures,
    )
