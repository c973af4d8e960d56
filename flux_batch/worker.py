"""What a worker does with a shard: rows -> batches -> pictures -> files -> commit.

Knows prompts, records and storage; takes the pipeline as an argument and does not know what computes a picture,
nor on which machine it runs.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa

from flux_batch.config import JobConfig, ModelConfig
from flux_batch.errors import DeviceFatal, NotFound
from flux_batch.records import SAMPLING_FIELDS, Commit, FailedRow, ImageRecord, ImageRequest, Shard, ShardResult
from flux_batch.storage.commits import Commits, Publisher
from flux_batch.storage.images import Pixels, encode
from flux_batch.storage.prompts import PromptSource
from flux_batch.storage.scratch import scratch_folder, sweep_scratch
from flux_batch.storage.shards import image_key, layout_for, shard_name
from flux_batch.storage.store import Store

# Batches whose pictures may wait for an encoder: enough to keep the device busy, and a bound on memory.
BATCHES_AHEAD = 2


class ImagePipeline(Protocol):
    """What computes pictures: prompts in, uint8 (h w 3) arrays out. FluxImagePipeline is one; tests bring their own."""

    @property
    def default_t5_sequence_length(self) -> int:
        """The text length used where none is asked for, in tokens."""
        ...

    def __call__(
        self,
        prompt: Sequence[str],
        *,
        negative_prompt: Sequence[str],
        width: int,
        height: int,
        num_inference_steps: int,
        embedded_guidance: Sequence[float],
        cfg_scale: Sequence[float],
        t5_sequence_length: int | None,
        seed: Sequence[int],
        output_type: Literal["np"],
    ) -> Sequence[Pixels]:
        """Make one picture for each prompt."""
        ...

    def truncations(self, prompts: Sequence[str], t5_sequence_length: int | None = None) -> list[tuple[bool, bool]]:
        """Tell for each prompt whether CLIP's and T5's tokenizers cut it."""
        ...


@dataclass(frozen=True, slots=True)
class Item:
    """One picture to make."""

    request: ImageRequest
    image_index: int

    @property
    def shape(self) -> tuple[Any, ...]:
        """What the pictures of one batch must have in common."""
        params = self.request.sampling
        return (params.width, params.height, params.num_inference_steps, params.uses_cfg, params.t5_sequence_length)


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
        return Worker(self, self.make_pipeline(self.config.model))


class Worker:
    """A pipeline with a way in and a way out: takes shards one after the other."""

    def __init__(self, recipe: WorkerRecipe, pipeline: ImagePipeline) -> None:
        self._config = recipe.config
        self._pipeline = pipeline
        self._source = PromptSource(recipe.config.prompts)
        self._commits = Commits(
            Store(recipe.config.output.uri, recipe.config.output.storage_options), recipe.num_shards
        )
        self._layout = layout_for(recipe.config.output, recipe.passthrough)
        self._publisher = Publisher(self._commits, self._layout, recipe.passthrough, _who())
        self._num_encoders = max(1, round(recipe.config.workers.num_cpus))

    def __call__(self, shard: Shard) -> ShardResult:
        """Run one shard to its commit; one that is committed already is left as it is."""
        started = time.monotonic()
        with suppress(NotFound):
            return _result(self._commits.read(shard.index))
        with scratch_folder() as scratch:
            run = ShardRun(shard_name(shard.index, self._commits.num_shards), scratch)
            for row in self._source.read(shard, self._config.sampling):
                if isinstance(row, FailedRow):
                    self._record_failed_row(run, row)
                else:
                    run.items += [Item(row, index) for index in range(len(row.seeds))]
            self._render(run)
            records = [run.records[place] for place in sorted(run.records)]
            commit = self._publisher.publish(shard.index, records, run.pictures, scratch)
        result = _result(commit)
        return replace(result, is_new=True, device_s=run.device_s, wall_s=time.monotonic() - started)

    def _render(self, run: ShardRun) -> None:
        """Make all pictures of a shard; encoding runs on threads while the device makes the next batch."""
        pending: deque[list[Future[None]]] = deque()
        with ThreadPoolExecutor(self._num_encoders, "encode") as encoders:
            for batch in batches(run.items, self._config.workers.batch_size):
                made = zip(batch, self._generate(run, batch), self._truncations(batch), strict=True)
                pending.append([encoders.submit(self._finish, run, *each) for each in made])
                if len(pending) > BATCHES_AHEAD:
                    _wait(pending.popleft())
            for futures in pending:
                _wait(futures)

    def _generate(self, run: ShardRun, batch: Sequence[Item]) -> list[Pixels | Exception]:
        """Make the pictures of a batch; if that fails, of its halves, until only what cannot be made has failed."""
        started = time.monotonic()
        try:
            return list(self._call_pipeline(batch))
        except DeviceFatal:
            raise
        except Exception as error:
            if len(batch) == 1:
                return [error]
        finally:
            run.device_s += time.monotonic() - started
        middle = len(batch) // 2
        return self._generate(run, batch[:middle]) + self._generate(run, batch[middle:])

    def _call_pipeline(self, batch: Sequence[Item]) -> Sequence[Pixels]:
        params = batch[0].request.sampling
        return self._pipeline(
            [item.request.prompt for item in batch],
            negative_prompt=[item.request.sampling.negative_prompt for item in batch],
            width=params.width,
            height=params.height,
            num_inference_steps=params.num_inference_steps,
            embedded_guidance=[item.request.sampling.embedded_guidance for item in batch],
            cfg_scale=[item.request.sampling.cfg_scale for item in batch],
            t5_sequence_length=params.t5_sequence_length,
            seed=[item.request.seeds[item.image_index] for item in batch],
            output_type="np",
        )

    def _truncations(self, batch: Sequence[Item]) -> list[tuple[bool, bool]]:
        prompts = [item.request.prompt for item in batch]
        return self._pipeline.truncations(prompts, batch[0].request.sampling.t5_sequence_length)

    def _finish(self, run: ShardRun, item: Item, made: Pixels | Exception, truncated: tuple[bool, bool]) -> None:
        """Encode one picture to the local disk and record it; runs on an encoder thread."""
        record = self._record(run, item, truncated)
        if isinstance(made, Exception):
            record |= {"status": "failed", "error_type": type(made).__name__, "error_message": _message(made)}
        else:
            data = encode(made, self._config.output.image, _provenance(record))
            path = run.scratch / record["key"]
            path.write_bytes(data)
            run.pictures[record["key"]] = path
            record |= {
                "status": "success",
                "file_name": self._layout.file_name(run.name, record["key"]),
                "sha256": hashlib.sha256(data).hexdigest(),
                "bytes": len(data),
            }
        run.records[item.request.row, item.image_index] = ImageRecord(**record)

    def _record(self, run: ShardRun, item: Item, truncated: tuple[bool, bool]) -> dict[str, Any]:
        request = item.request
        record: dict[str, Any] = {name: getattr(request.sampling, name) for name in SAMPLING_FIELDS}
        record["t5_sequence_length"] = record["t5_sequence_length"] or self._pipeline.default_t5_sequence_length
        return record | {
            "key": image_key(run.name, request.row, item.image_index),
            "id": request.id,
            "image_index": item.image_index,
            "prompt": request.prompt,
            "seed": request.seeds[item.image_index],
            "clip_truncated": truncated[0],
            "t5_truncated": truncated[1],
            "model": self._config.model.uri,
            "passthrough": request.passthrough,
        }

    def _record_failed_row(self, run: ShardRun, row: FailedRow) -> None:
        """Record a row that never became a request: one failed image, whatever number it asked for."""
        run.records[row.row, 0] = ImageRecord(
            key=image_key(run.name, row.row, 0),
            id=row.id,
            image_index=0,
            prompt=row.prompt,
            model=self._config.model.uri,
            status="failed",
            error_type=row.error_type,
            error_message=row.error_message,
            passthrough=row.passthrough,
        )


@dataclass
class ShardRun:
    """The state of one shard while it is being made."""

    name: str
    scratch: Path
    items: list[Item] = field(default_factory=list)
    records: dict[tuple[int, int], ImageRecord] = field(default_factory=dict)  # by (row, image index)
    pictures: dict[str, Path] = field(default_factory=dict)  # by key
    device_s: float = 0.0


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Group pictures that can share a forward pass, in order of first appearance; a function of the input alone."""
    groups: dict[tuple[Any, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(item.shape, []).append(item)
    for group in groups.values():
        for first in range(0, len(group), size):
            yield group[first : first + size]


def _who() -> str:
    """Name this process for the commit: which machine to look at when a shard looks odd."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _provenance(record: dict[str, Any]) -> dict[str, Any]:
    """Choose what a picture says of itself."""
    return {name: value for name, value in record.items() if name != "passthrough"}


def _message(error: Exception) -> str:
    """Say what went wrong in one line, with the place for errors that are not meant for users."""
    place = ""
    if frames := traceback.extract_tb(error.__traceback__):
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return " ".join(str(error).split())[:1000] + place


def _wait(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()


def _result(commit: Commit) -> ShardResult:
    return ShardResult(
        shard=commit.shard,
        worker=commit.worker,
        num_images=commit.num_images,
        num_failed=commit.num_failed,
        num_bytes=sum(file.bytes for file in commit.files),
    )
