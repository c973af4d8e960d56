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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import pyarrow as pa

from flux_batch.batches import Item, batches, with_pictures
from flux_batch.config import JobConfig, ModelConfig
from flux_batch.errors import DeviceFatal, FluxBatchError, NotFound, OutOfMemory
from flux_batch.lora_switch import LoraSwitch
from flux_batch.records import (
    SAMPLING_FIELDS,
    Commit,
    FailedRow,
    ImageRecord,
    ImageRequest,
    InputImage,
    Shard,
    ShardResult,
)
from flux_batch.storage.commits import Commits, Publisher
from flux_batch.storage.images import Pixels, encode
from flux_batch.storage.input_images import laid_aside, load_picture
from flux_batch.storage.prompts import PromptSource
from flux_batch.storage.row_loras import RowLoras
from flux_batch.storage.scratch import scratch_folder, sweep_scratch
from flux_batch.storage.shards import image_key, layout_for, shard_name
from flux_batch.storage.store import Store

# Batches whose pictures may wait for an encoder: enough to keep the device busy, and a bound on memory.
BATCHES_AHEAD = 2
# Threads that read input pictures; each may hold a large one before it is made smaller.
READERS = 4


class Tiles(NamedTuple):
    """How the autoencoder is cut, in latents when decoding."""

    size: int
    stride: int


# The last resort: a quarter of the pixels of a 1024 x 1024 picture at a time.
SMALL_TILES = Tiles(64, 32)


class ImagePipeline(Protocol):
    """What computes pictures: prompts in, uint8 (h w 3) arrays out. FluxImagePipeline is one; tests bring their own.

    Of the arguments with a default, only those that a batch needs are given.
    """

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
        sigma_shift: float | None = None,
        input_image: Sequence[Any] | None = None,
        denoising_strength: float = 1.0,
        tiled: bool = False,
        tile_size: int = 128,
        tile_stride: int = 64,
    ) -> Sequence[Pixels]:
        """Make one picture for each prompt."""
        ...

    def set_loras(self, loras: Sequence[tuple[str, float]]) -> None:
        """Use these LoRAs, address and scale, from now on, and no others; called only if a job has any."""
        ...

    def truncations(self, prompts: Sequence[str], t5_sequence_length: int | None = None) -> list[tuple[bool, bool]]:
        """Tell for each prompt whether CLIP's and T5's tokenizers cut it."""
        ...


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
        sampling = recipe.config.sampling
        self._loras = LoraSwitch(pipeline, RowLoras(recipe.config.model.loras, "").of_job)
        self._tiles = Tiles(sampling.tile_size, sampling.tile_stride) if sampling.tiled else None

    def __call__(self, shard: Shard) -> ShardResult:
        """Run one shard to its commit; one that is committed already is left as it is."""
        started = time.monotonic()
        with suppress(NotFound):
            return _result(self._commits.read(shard.index))
        with scratch_folder() as scratch:
            run = ShardRun(shard_name(shard.index, self._commits.num_shards), scratch)
            for row in self._source.read(shard, self._config.sampling, self._config.model.loras):
                if isinstance(row, FailedRow):
                    self._record_failed_row(run, row)
                else:
                    run.add(row)
            self._render(run)
            records = [run.records[place] for place in sorted(run.records)]
            commit = self._publisher.publish(shard.index, records, run.pictures, scratch)
        result = _result(commit)
        return replace(result, is_new=True, device_s=run.device_s, wall_s=time.monotonic() - started)

    def _render(self, run: ShardRun) -> None:
        """Make all pictures of a shard; on threads, what the next start from is read and what was made is encoded."""
        pending: deque[list[Future[None]]] = deque()
        todo = list(batches(run.items, self._config.workers.batch_size))
        with (
            ThreadPoolExecutor(self._num_encoders, "encode") as encoders,
            ThreadPoolExecutor(READERS, "read") as readers,
        ):
            for batch in with_pictures(todo, readers, self._read_picture):
                made = zip(batch, self._generate(run, batch), self._truncations(batch), strict=True)
                pending.append([encoders.submit(self._finish, run, *each) for each in made])
                if len(pending) > BATCHES_AHEAD:
                    _wait(pending.popleft())
            for futures in pending:
                _wait(futures)

    def _read_picture(self, image: InputImage, size: tuple[int, int]) -> Any:
        return load_picture(image, self._config.prompts.storage_options, size)

    def _generate(self, run: ShardRun, batch: Sequence[Item]) -> list[Pixels | Exception]:
        """Make the pictures of a batch, but for those whose input picture or LoRA cannot be read."""
        ready = [item for item in batch if not isinstance(item.picture, Exception)]
        if ready and (error := self._loras.use(ready[0].request.loras)):
            return [error] * len(batch)
        made = iter(self._attempt(run, ready, self._tiles) if ready else [])
        return [item.picture if isinstance(item.picture, Exception) else next(made) for item in batch]

    def _attempt(self, run: ShardRun, batch: Sequence[Item], tiles: Tiles | None) -> list[Pixels | Exception]:
        """Make the pictures of a batch; if that fails, of its halves, until only what cannot be made has failed.

        A single one that does not fit into memory is tried once more with the autoencoder in small tiles.
        """
        started = time.monotonic()
        try:
            made: list[Pixels | Exception] = list(self._call_pipeline(batch, tiles))
            run.tiles |= {item.place: tiles for item in batch if tiles}
            return made
        except DeviceFatal:
            raise
        except Exception as error:
            if len(batch) == 1 and not (isinstance(error, OutOfMemory) and is_larger(tiles, SMALL_TILES)):
                return [error]
        finally:
            run.device_s += time.monotonic() - started
        if len(batch) == 1:
            return self._attempt(run, batch, SMALL_TILES)
        middle = len(batch) // 2
        return self._attempt(run, batch[:middle], tiles) + self._attempt(run, batch[middle:], tiles)

    def _call_pipeline(self, batch: Sequence[Item], tiles: Tiles | None) -> Sequence[Pixels]:
        params = batch[0].request.sampling
        options: dict[str, Any] = {}
        if params.sigma_shift is not None:
            options["sigma_shift"] = params.sigma_shift
        if batch[0].picture is not None:
            options |= {
                "input_image": [item.picture for item in batch],
                "denoising_strength": params.denoising_strength,
            }
        if tiles:
            options |= {"tiled": True, "tile_size": tiles.size, "tile_stride": tiles.stride}
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
            **options,
        )

    def _truncations(self, batch: Sequence[Item]) -> list[tuple[bool, bool]]:
        """Tell of each picture whether CLIP and whether T5 leaves out the end of its prompt or negative prompt."""
        params = batch[0].request.sampling
        cut = self._pipeline.truncations([item.request.prompt for item in batch], params.t5_sequence_length)
        if not params.uses_cfg:
            return cut
        negative_prompts = [item.request.sampling.negative_prompt for item in batch]
        negative = self._pipeline.truncations(negative_prompts, params.t5_sequence_length)
        return [(a or c, b or d) for (a, b), (c, d) in zip(cut, negative, strict=True)]

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
        run.records[item.place] = ImageRecord(**record)

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
            "input_image": request.input_image.name if request.input_image else None,
            **self._loras.words(request.loras),
            "tile_size": run.tiles[item.place].size if item.place in run.tiles else None,
            "clip_truncated": truncated[0],
            "t5_truncated": truncated[1],
            **self._model_words(),
            "passthrough": request.passthrough,
        }

    def _model_words(self) -> dict[str, Any]:
        """Say which model made a picture, and what was traded for speed or memory."""
        model = self._config.model
        return {"model": model.uri, "quantization": model.quantization, "step_cache": model.step_cache}

    def _record_failed_row(self, run: ShardRun, row: FailedRow) -> None:
        """Record a row that never became a request: one failed image, whatever number it asked for."""
        run.records[row.row, 0] = ImageRecord(
            key=image_key(run.name, row.row, 0),
            id=row.id,
            image_index=0,
            prompt=row.prompt,
            **self._model_words(),
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
    tiles: dict[tuple[int, int], Tiles] = field(default_factory=dict)  # by (row, image index), where there were any
    records: dict[tuple[int, int], ImageRecord] = field(default_factory=dict)  # by (row, image index)
    pictures: dict[str, Path] = field(default_factory=dict)  # by key
    device_s: float = 0.0

    def add(self, request: ImageRequest) -> None:
        """Take in a row; bytes of a picture in it wait on the disk, as a shard of them may not fit into memory."""
        if request.input_image:
            request = replace(request, input_image=laid_aside(request.input_image, self.scratch))
        self.items += [Item(request, index) for index in range(len(request.seeds))]


def is_larger(tiles: Tiles | None, others: Tiles) -> bool:
    """Whether a picture, whole or in tiles, takes more memory than in others."""
    return tiles is None or tiles.size > others.size


def _who() -> str:
    """Name this process for the commit: which machine to look at when a shard looks odd."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _provenance(record: dict[str, Any]) -> dict[str, Any]:
    """Choose what a picture says of itself: what it was made with."""
    return {name: value for name, value in record.items() if name != "passthrough" and value is not None}


def _message(error: Exception) -> str:
    """Say what went wrong in one line, with the place for errors that are not meant for users."""
    place = ""
    if isinstance(error, FluxBatchError):
        return " ".join(str(error).split())[:1000]
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
