"""The work on a shard: rows -> batches -> images -> files -> commit.

It has two parts, so that the device need not wait for the storage: `Worker.make` ends with the last image, and
`MadeShard.finish` commits the shard while the next one is made.

This module knows prompts, records and storage. It gets the pipeline as an argument, and knows neither how an image is
computed nor on which machine it runs.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from flux_batch.config.known_settings import check_settings
from flux_batch.config.running import QualityConfig
from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.errors import NotFound, Stopped
from flux_batch.output.commits import Commits, Publisher
from flux_batch.output.formats import format_for
from flux_batch.output.paths import PLAN, RunFolder
from flux_batch.output.staging import Staging
from flux_batch.prompts.access import RowLoras
from flux_batch.prompts.input_images import load_images
from flux_batch.prompts.listing import LISTING_RULES
from flux_batch.prompts.source import PromptSource
from flux_batch.records import Attempt, Commit, FailedRow, RowImages, Shard, ShardWork
from flux_batch.storage.retry import RetryPolicy, WorkerStop
from flux_batch.storage.scratch import scratch_folder, sweep_scratch
from flux_batch.storage.store import Store
from flux_batch.telemetry import LOADING, Heartbeat, Metrics, ShardMetrics
from flux_batch.worker.auto_batch_size import measured_batch_size, remembered_batch_size
from flux_batch.worker.batches import READ_AHEAD, InputImages
from flux_batch.worker.compile_cache import SharedCompileCache
from flux_batch.worker.generate import BatchMaker, ImageOutcome, Tiles, image_options
from flux_batch.worker.made_shard import CommittedShard, MadeShard
from flux_batch.worker.protocol import ImagePipeline, Scorer
from flux_batch.worker.quality import JudgedShard, with_scores
from flux_batch.worker.recorder import Recorder, message_of
from flux_batch.worker.settled_precision import load_settled
from flux_batch.worker.shard import ShardRun
from flux_batch.worker.staging_queue import StagingQueue

# Batches that may be on their way to the staging area while the next is made; a killed worker loses them all.
_MAX_IN_FLIGHT = 1
# Threads that read input images; each may hold a large image in memory until it is resized.
_INPUT_IMAGE_READERS = 4
_FIRST_ATTEMPT = Attempt()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerFactory:
    """The settings of a worker, with a small pickle: the worker is opened on the machine of its device.

    retry_failed: in uncommitted shards, make images again that failed in earlier attempts.
    """

    config: JobConfig
    num_shards: int
    passthrough: pa.Schema
    make_pipeline: Callable[[ModelConfig], ImagePipeline]
    rules: int = LISTING_RULES
    make_scorer: Callable[[QualityConfig], Scorer] | None = None
    retry_failed: bool = False

    def open(self) -> Worker:
        """Load the model and open the output, after removing the local files of killed workers.

        Raises: NotFound if the output is not the driver's.
        """
        sweep_scratch()
        output, failures = self.config.output, self.config.failures
        store = Store(output.uri, output.storage_options, RetryPolicy(failures.outage_s, LOADING.beat))
        _check_is_shared(store)
        pipeline, model = load_settled(store, self.config.model, self.make_pipeline)
        return Worker(replace(self, config=self.config.model_copy(update={"model": model})), pipeline)


def _check_is_shared(store: Store) -> None:
    """Raise NotFound if the output has no plan here: the driver would not see images of this node."""
    if not store.exists(PLAN):
        raise NotFound(
            f"{store.uri}: holds no run on {socket.gethostname()}, where a worker starts; set output.uri to a bucket, "
            "or to a folder that this node shares with the driver"
        )


class Worker:
    """A worker: it makes one shard after the other with its pipeline."""

    def __init__(self, factory: WorkerFactory, pipeline: ImagePipeline) -> None:
        config = self._config = factory.config
        # FLUX.1 knows all settings, and itself refuses those that its variant does not use.
        self._known: Collection[str] | None = getattr(pipeline, "settings", None)
        check_settings(config, self._known)
        self.metrics = Metrics(config.name)
        self._heartbeat = Heartbeat()
        self._stop = WorkerStop(config.failures.drain_s)
        self._source = PromptSource(config.prompts, factory.rules)
        self._retry_failed = factory.retry_failed
        self._pipeline = pipeline
        self._store = Store(
            config.output.uri,
            config.output.storage_options,
            self._stop.policy(config.failures.outage_s, self._heartbeat.beat),
        )
        self._compile_cache = SharedCompileCache(self._store, pipeline.compile_cache)
        run = RunFolder(self._store, factory.num_shards)
        self._staging, self._commits = Staging(run), Commits(run)
        output_format = format_for(config.output, factory.passthrough)
        name = f"{socket.gethostname()}:{os.getpid()}"
        self._publisher = Publisher(self._commits, output_format, factory.passthrough, name)
        loras = RowLoras(config.model.loras, "").defaults
        self._image_options = image_options(config)
        self._maker = BatchMaker(
            pipeline,
            loras,
            Tiles.of(config.sampling),
            self._beat_making,
            image_options=self._image_options,
        )
        # Read after the LoRAs of the job are set, which may turn the model into another variant.
        self._guidance = pipeline.default_guidance
        self._recorder = Recorder(config.model, output_format, pipeline.default_t5_sequence_length)
        self._scorer = None
        if config.quality:
            assert factory.make_scorer, "a job with `quality` needs a scorer"
            self._scorer = factory.make_scorer(config.quality)

    def make(self, shard: Shard, attempt: Attempt = _FIRST_ATTEMPT) -> MadeShard | CommittedShard:
        """Make the images of a shard; a committed one is left unchanged.

        Returns: the shard, which must be finished; another thread may do this while the next one is made.
        Raises: Stopped after stop(), with the images made so far in the staging area.
        """
        started, unix_time, device_s = time.monotonic(), time.time(), self._maker.device_s
        metrics = ShardMetrics(self.metrics)
        with self._heartbeat.busy("make"), ExitStack() as resources:
            if commit := self._commits.find(shard.index):
                return CommittedShard(commit)
            resources.callback(self.metrics.put_down, shard.index)
            with metrics.timed("read"):
                run = self._read_rows(shard, attempt, resources.enter_context(scratch_folder()))
            staging = resources.enter_context(self._staging_queue(run, metrics))
            other_commit = self._make_batches(run, staging, metrics)
            judged = JudgedShard(self._config.quality, run) if self._config.quality else None
            while judged and other_commit is None:
                staging.wait()
                if (again := judged.next_round()) is None:
                    break
                again.adopt_staged()
                staging = resources.enter_context(self._staging_queue(again, metrics))
                other_commit = self._make_batches(again, staging, metrics)
            self._compile_cache.share()
            return MadeShard(
                run=judged or run,
                staging=staging,
                commit=other_commit,
                publisher=self._publisher,
                metrics=metrics,
                heartbeat=self._heartbeat,
                resources=resources.pop_all(),
                started=started,
                work=ShardWork(
                    device_s=self._maker.device_s - device_s,
                    started_unix_time=unix_time,
                    attempt=attempt.number,
                    num_lost=attempt.lost,
                ),
            )

    def stop(self) -> None:
        """Stop the current shard after its present batch, and make no other."""
        self._stop.request()

    def idle_s(self) -> float:
        """Return the seconds since the last progress of making or finishing; 0 if neither runs."""
        return self._heartbeat.idle_s()

    def _read_rows(self, shard: Shard, attempt: Attempt, scratch: Path) -> ShardRun:
        """Read the rows of a shard, and adopt the images staged by earlier attempts."""
        run = ShardRun(
            shard,
            attempt,
            self._recorder,
            self._staging,
            self._config.output,
            scratch,
            retry_failed=self._retry_failed,
        )
        sampling, loras = self._config.sampling, self._config.model.loras
        for row in self._source.read(shard, sampling, loras, self._known, self._guidance):
            run.add(row)
            if isinstance(row, FailedRow):
                self.metrics.add("failures", label=row.error_type)
        run.adopt_staged()
        self.metrics.count_shard(run.index, run.count)
        self._beat_making()
        return run

    def _staging_queue(self, run: ShardRun, metrics: ShardMetrics) -> StagingQueue:
        num_encoders = max(1, round(self._config.workers.num_cpus))
        return StagingQueue(run, self._commits, num_encoders, metrics, partial(self._on_staged, run))

    def _on_staged(self, run: ShardRun) -> None:
        """Count the images of a shard, except further tries, and record a sign of life."""
        if not run.is_retry:
            self.metrics.count_shard(run.index, run.count)
        self._heartbeat.beat()

    def _make_batches(self, run: ShardRun, staging: StagingQueue, metrics: ShardMetrics) -> Commit | None:
        """Make the remaining images of a shard. Returns: the commit of another attempt that was faster.

        While one batch is made, the input images of the next are read, the previous batch is encoded and staged, and
        other attempts at the shard are polled.
        """
        queue = run.queue(self._batch_size)
        self._maker.start_shard([task for batch in queue for task in batch.tasks])
        readers = ThreadPoolExecutor(_INPUT_IMAGE_READERS, "read")
        with ExitStack() as on_end:
            # At a stop, images read ahead are not needed, and a server may not answer for minutes.
            on_end.callback(readers.shutdown, wait=False, cancel_futures=True)
            images = InputImages(readers, self._read_images)
            for number, batch in enumerate(queue):
                if self._stop.is_requested:
                    return self._stop_shard(run, staging)
                if commit := staging.polled_commit():
                    return commit
                tasks = run.begin(batch)
                if not tasks:
                    continue
                # Not at the ends: staged images are listed before the first batch and after the last one anyway.
                if 0 < number < len(queue) - 1:
                    staging.poll()
                # In isolation nothing is read ahead: if the process dies while it reads, the mark shows the batch.
                following = [] if run.is_isolated else queue[number + 1 : number + 1 + READ_AHEAD]
                with run.marked(batch, self._publisher.worker):
                    with metrics.timed("input"):
                        ready = images.join(tasks, [one.tasks for one in following])
                    with metrics.timed("make"):
                        outcomes = self._judged(run, run.missing(self._maker.make(ready)))
                self._count(run, outcomes)
                staging.put(outcomes)
                with metrics.timed("wait"):
                    staging.wait(0 if run.is_isolated else _MAX_IN_FLIGHT)
        return None

    def _judged(self, run: ShardRun, outcomes: Sequence[ImageOutcome]) -> Sequence[ImageOutcome]:
        """Return outcomes with the scores of their images, if the job has `quality`."""
        if self._scorer is None:
            return outcomes
        with self.metrics.timed("judge"):
            scored = with_scores(outcomes, self._scorer, partial(self._recorder.outcome_fields, run.name))
        self._beat_making()
        return scored

    def _stop_shard(self, run: ShardRun, staging: StagingQueue) -> Commit:
        """Stage the images made so far. Returns: the commit of another attempt, if there is one.

        Raises: Stopped if there is none.
        """
        staging.wait()
        if commit := self._commits.find(run.index):
            return commit
        raise Stopped(f"shard {run.name}: stopped with {len(run.images)} of {run.num_tasks} images")

    def _count(self, run: ShardRun, outcomes: Sequence[ImageOutcome]) -> None:
        """Count the images of a batch, and log those that failed."""
        errors = {run.key(one.task): one.result for one in outcomes if isinstance(one.result, Exception)}
        self.metrics.add("images", len(outcomes) - len(errors))
        for key, error in errors.items():
            self.metrics.add("failures", label=type(error).__name__)
            about = {"run": self._config.name, "shard": run.index, "key": key}
            log.info("%s: %s", key, message_of(error), extra=about)

    @cached_property
    def _batch_size(self) -> int:
        size = self._config.workers.batch_size
        return remembered_batch_size(self._store, self._measure_batch_size) if size == "auto" else size

    def _measure_batch_size(self) -> int:
        sampling = self._config.sampling.for_model(self._guidance)
        return measured_batch_size(self._pipeline, sampling, self._beat_making, image_options=self._image_options)

    def _read_images(self, images: RowImages, size: tuple[int, int] | None) -> Mapping[str, Any]:
        options, resize = self._config.prompts.storage_options, self._config.sampling.resize_references
        return load_images(images, options, size, resize_references=resize)

    def _beat_making(self) -> None:
        self._heartbeat.beat("make")
