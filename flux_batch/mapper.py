"""FluxMapper: FLUX as one stage of somebody's data pipeline, by the same steps as a job.

Knows batches of rows; does not know where they come from, where they go, nor who calls. Needs no Ray.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.errors import DeviceFatal, JobError, SourceError, StoreError
from flux_batch.images import encode
from flux_batch.output.formats import format_for
from flux_batch.output.metadata import RECORD_SCHEMA
from flux_batch.pipeline.load import load_pipeline
from flux_batch.prompts.input_images import load_image
from flux_batch.prompts.row_loras import RowLoras
from flux_batch.prompts.source import RowParser
from flux_batch.records import FailedRow, ImageRecord, ImageRequest, InputImage
from flux_batch.worker.batches import READ_AHEAD, ImageTask, InputImages, batches, tasks_of
from flux_batch.worker.generate import BatchMaker, ImageOutcome, Tiles
from flux_batch.worker.protocol import ImagePipeline
from flux_batch.worker.recorder import Recorder, message_of, provenance

# What each image adds to its row, of what a job writes into its metadata.
ADDED = (
    *("image_index", "seed", "width", "height", "clip_truncated", "t5_truncated", "sha256"),
    *("status", "error_type", "error_message"),
)
SCHEMA = pa.schema([("image", pa.binary()), *((name, RECORD_SCHEMA.field(name).type) for name in ADDED)])
# What a row may ask for under the same name: the answer takes its place.
ANSWERED = {"seed", "width", "height"}
READERS, ENCODERS = 4, 2
# sysexits.h EX_SOFTWARE, as of the job's workers.
DEVICE_FATAL_EXIT = 70

# The encoded bytes, if it could be made, and what there is to say of it.
Image: TypeAlias = tuple[bytes | None, ImageRecord]
# What Ray Data gives by the batch formats "numpy" and "pyarrow".
Batch: TypeAlias = dict[str, Any] | pa.Table


class FluxMapper:
    """A callable for `ds.map_batches(FluxMapper, fn_constructor_kwargs=..., num_gpus=1)`.

    Takes the sections `model`, `sampling` and `prompts` of a job file, and `image` of its `output`; rows are validated
    and images made as in a job, so that the same ids and seeds give the same images. `prompts.uri` is only where
    relative paths in rows start from: the folder of the process, unless it is given. `batch_size` is how many images
    are made in one forward pass, whatever number of rows comes at a time.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        sampling: Mapping[str, Any] | None = None,
        *,
        prompts: Mapping[str, Any] | None = None,
        image: Mapping[str, Any] | None = None,
        batch_size: int = 4,
        prefix: str = "",
        exit_on_device_loss: bool = False,
        make_pipeline: Callable[[ModelConfig], ImagePipeline] = load_pipeline,
    ) -> None:
        """Load the model.

        prefix: put before the names of the columns that are added. exit_on_device_loss: end this process when its GPU
        is lost for good, so that Ray Data takes another; else DeviceFatal is raised.
        Raises: JobError for wrong settings; CheckpointError, StoreError for a model that cannot be loaded.
        """
        tree = {
            "prompts": {"uri": ".", **(prompts or {})},
            "output": {"uri": ".", "image": dict(image or {})},
            "model": dict(model),
            "sampling": dict(sampling or {}),
            "workers": {"batch_size": batch_size},
        }
        config = JobConfig.from_dict(tree, origin="FluxMapper")
        if config.prompts.limit or config.prompts.passthrough:
            raise JobError("FluxMapper: prompts.limit and prompts.passthrough are for jobs: leave them out")
        self._prompts, self._image, self._batch_size = config.prompts, config.output.image, batch_size
        self._parser = RowParser(
            config.prompts, config.sampling, f"{config.prompts.uri[0].rstrip('/')}/rows", config.model.loras
        )
        self._prefix, self._exit_on_device_loss = prefix, exit_on_device_loss
        pipeline = make_pipeline(config.model)
        settings = config.model
        if settings.quantization == "none":  # else it stands as the caller has set it
            settings = settings.model_copy(update={"quantization": pipeline.precision["quantization"]})
        loras = RowLoras(config.model.loras, "").of_job
        self._maker = BatchMaker(pipeline, loras, Tiles.of(config.sampling))
        self._recorder = Recorder(settings, format_for(config.output), pipeline.default_t5_sequence_length)

    def __call__(self, batch: Batch) -> Batch:
        """Make the images of a batch: a dict of NumPy columns, or an Arrow table, which is what comes back.

        Each row comes back once for each of its images, in order, with the columns `image` (encoded bytes) and ADDED;
        `seed`, `width` and `height` are those of the image. An image that cannot be made has none, the status
        `failed` and the reason. Raises: SourceError for a batch without the columns that the settings name.
        """
        self._check_columns(column_names(batch))
        rows = self._parse(batch)
        found: dict[tuple[int, int], Image] = {
            (row.row, 0): (None, self._recorder.failed_row("", row)) for row in rows if isinstance(row, FailedRow)
        }
        found |= self._make([row for row in rows if isinstance(row, ImageRequest)])
        places = sorted(found)
        columns: dict[str, list[Any]] = {"image": [found[place][0] for place in places]}
        columns |= {name: [getattr(found[place][1], name) for place in places] for name in ADDED}
        named = {self._prefix + name: values for name, values in columns.items()}
        schema = pa.schema([field.with_name(self._prefix + field.name) for field in SCHEMA])
        return extended(batch, [row for row, _ in places], named, schema)

    def _check_columns(self, names: Sequence[str]) -> None:
        for field, column in {"prompt": "prompt", **self._prompts.columns}.items():
            if column not in names:
                raise SourceError(f"the batch has no column {column!r}; prompts.columns.{field} says which it is")
        for name in SCHEMA.names:
            if self._prefix + name in names and not (name in ANSWERED and not self._prefix):
                raise SourceError(f"the batch has a column {self._prefix + name!r} already; give another `prefix`")

    def _parse(self, batch: Batch) -> list[ImageRequest | FailedRow]:
        """Validate the rows; one without an id is known by its prompt, so that its image is the same every time."""
        prompt = self._prompts.columns.get("prompt", "prompt")
        return [
            self._parser.parse(values, row=row, default_id=_id_of(values.get(prompt)))
            for row, values in enumerate(rows_of(batch, self._parser.columns))
        ]

    def _make(self, requests: Sequence[ImageRequest]) -> dict[tuple[int, int], Image]:
        """Make the images of rows, by row and image index; while some are made, the last are encoded."""
        tasks = [task for request in requests for task in tasks_of(request)]
        groups = list(batches(tasks, self._batch_size))
        encoded: dict[tuple[int, int], Future[Image]] = {}
        with ThreadPoolExecutor(READERS, "read") as readers, ThreadPoolExecutor(ENCODERS, "encode") as encoders:
            images = InputImages(readers, self._read_image)
            for number, group in enumerate(groups):
                ready = images.join(group, groups[number + 1 : number + 1 + READ_AHEAD])
                outcomes = self._make_group(ready)
                encoded |= {one.task.position: encoders.submit(self._encode, one) for one in outcomes}
            return {position: future.result() for position, future in encoded.items()}

    def _make_group(self, group: Sequence[ImageTask]) -> list[ImageOutcome]:
        try:
            return self._maker.make(group)
        except StoreError as error:  # of a LoRA; there is no shard here that could wait for the storage
            return [ImageOutcome(task, error) for task in group]
        except DeviceFatal:
            if self._exit_on_device_loss:
                os._exit(DEVICE_FATAL_EXIT)  # an exception would have the next batch tried on the same device
            raise

    def _read_image(self, image: InputImage, size: tuple[int, int]) -> Any:
        try:
            return load_image(image, self._prompts.storage_options, size)
        except StoreError as error:  # costs the row, as above
            return error

    def _encode(self, outcome: ImageOutcome) -> Image:
        """Encode one image and record it as a job would, but without its key, which is of a shard."""
        fields = self._recorder.outcome_fields("", outcome)
        if isinstance(outcome.result, Exception):
            return None, self._recorder.failed(fields, type(outcome.result).__name__, message_of(outcome.result))
        inside = {name: value for name, value in provenance(fields).items() if name != "key"}
        data = encode(outcome.result, self._image, inside)
        return data, self._recorder.made("", fields, data)


def _id_of(prompt: Any) -> str:
    return f"prompt-{hashlib.blake2b(repr(prompt).encode(), digest_size=8).hexdigest()}"


def column_names(batch: Batch) -> list[str]:
    """Name the columns. Raises: SourceError for anything but a batch in columns."""
    if isinstance(batch, pa.Table):
        return list(batch.column_names)
    if isinstance(batch, dict):
        return list(batch)
    raise SourceError(f"a batch is a {type(batch).__name__}: take batch_format 'numpy' or 'pyarrow'")


def rows_of(batch: Batch, names: Collection[str]) -> list[dict[str, Any]]:
    """Give the rows of a batch in plain Python values, with those of the columns `names` that there are.

    A NaN of NumPy is None, since NumPy has no other way to leave out a number.
    """
    found = [name for name in column_names(batch) if name in names]
    if isinstance(batch, pa.Table):
        return [dict(row) for row in batch.select(found).to_pylist()]
    columns = [_plain(batch[name]) for name in found]
    return [dict(zip(found, values, strict=True)) for values in zip(*columns, strict=True)]


def extended(batch: Batch, rows: Sequence[int], columns: Mapping[str, Sequence[Any]], schema: pa.Schema) -> Batch:
    """Give the rows `rows` of a batch with further columns, in the place of any of their names; types as in `schema`.

    Those of a batch of NumPy are of Python objects, since they may hold None.
    """
    if isinstance(batch, pa.Table):
        table = batch.drop_columns([name for name in batch.column_names if name in columns]).take(pa.array(rows))
        for name, values in columns.items():
            table = table.append_column(schema.field(name), [pa.array(values, schema.field(name).type)])
        return table
    kept = {name: np.asarray(values)[list(rows)] for name, values in batch.items() if name not in columns}
    return kept | {name: _objects(values) for name, values in columns.items()}


def _plain(values: Any) -> list[Any]:
    array = np.asarray(values)
    return [None if isinstance(value, float) and value != value else value for value in array.tolist()]


def _objects(values: Sequence[Any]) -> np.ndarray[Any, Any]:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
