"""FLUX as one stage of a data pipeline, with the same steps as a job.

This module knows batches of rows, not their source, their destination or their caller. It does not need Ray.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from flux_batch.config.known_settings import check_settings
from flux_batch.config.running import QualityConfig
from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.dataset.annotators.score import load_scorer
from flux_batch.errors import DeviceFatal, JobError, SourceError, StoreError
from flux_batch.images import encode
from flux_batch.output.formats import format_for
from flux_batch.output.metadata import QUALITY_FIELDS, RECORD_SCHEMA, record_row
from flux_batch.pipeline.load import load_pipeline
from flux_batch.prompts.access import RowLoras
from flux_batch.prompts.formats.arrow import python_rows
from flux_batch.prompts.formats.table import BadRow, Row
from flux_batch.prompts.input_images import load_images
from flux_batch.prompts.rows import RowParser
from flux_batch.records import FailedRow, ImageRecord, ImageRequest, RowImages
from flux_batch.worker.batches import READ_AHEAD, ImageTask, InputImages, batches, tasks_of
from flux_batch.worker.generate import BatchMaker, ImageOutcome, Tiles, image_options
from flux_batch.worker.protocol import ImagePipeline, Scorer
from flux_batch.worker.quality import Try, choose, is_open, kept_record, with_scores
from flux_batch.worker.recorder import Recorder, message_of, provenance

# The metadata columns of a job that each image adds to its row.
_ADDED_FIELDS = (
    *("image_index", "seed", "width", "height", "clip_truncated", "t5_truncated", "sha256"),
    *("status", "error_type", "error_message"),
)
_QUALITY_SCHEMA = pa.schema(QUALITY_FIELDS)
_ADDED_SCHEMA = pa.schema([("image", pa.binary()), *((name, RECORD_SCHEMA.field(name).type) for name in _ADDED_FIELDS)])
# Columns of these names in a batch are settings that rows request; the values of the image replace them.
_REPLACED_COLUMNS = {"seed", "width", "height"}
_INPUT_IMAGE_READERS = 4
_ENCODERS = 2
# Rows of one Arrow array, which can hold 2 GiB of bytes: a PNG of 8192 x 8192 has up to 200 MB.
_ROWS_PER_CHUNK = 8
# EX_SOFTWARE of sysexits.h; the workers of a job exit with it too.
_DEVICE_FATAL_EXIT = 70

# The bytes of an image, None if it failed, and its record.
_EncodedImage: TypeAlias = tuple[bytes | None, ImageRecord]
# A batch of rows in the batch formats "numpy" and "pyarrow" of Ray Data.
_ColumnBatch: TypeAlias = dict[str, Any] | pa.Table


class FluxMapper:
    """A callable for `ds.map_batches(FluxMapper, fn_constructor_kwargs=..., num_gpus=1)`.

    It takes the sections `model`, `sampling` and `prompts` of a job file, and `image` of its `output`. It validates
    rows and makes images as a job does, so the same ids and seeds give the same images. `prompts.uri` is only the
    folder of relative paths in rows, by default the working directory. `batch_size` is the number of images in one
    forward pass, whatever the number of rows in a call.

    >>> import numpy as np
    >>> mapper = FluxMapper({"uri": "demo"}, {"width": 64, "height": 64, "num_inference_steps": 2})
    >>> made = mapper({"id": np.array(["7"]), "prompt": np.array(["a red star"])})
    >>> made["image"][0][:4], made["width"][0], made["status"][0]
    (b'\\x89PNG', 64, 'success')
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        sampling: Mapping[str, Any] | None = None,
        *,
        prompts: Mapping[str, Any] | None = None,
        image: Mapping[str, Any] | None = None,
        batch_size: int = 4,
        quality: Mapping[str, Any] | None = None,
        prefix: str = "",
        exit_on_device_loss: bool = False,
        make_pipeline: Callable[[ModelConfig], ImagePipeline] = load_pipeline,
        make_scorer: Callable[[QualityConfig], Scorer] = load_scorer,
    ) -> None:
        """Load the model.

        quality: the section `quality` of a job; it adds the columns `tries`, `score` and `accepted`. prefix: a prefix
        of the names of added columns. exit_on_device_loss: exit this process when its GPU is unusable, so that Ray
        Data starts another; otherwise DeviceFatal is raised.
        Raises: JobError for wrong settings; CheckpointError, StoreError for a model that cannot be loaded.
        """
        tree = {
            "prompts": _section({} if prompts is None else prompts, uri="."),
            "output": {"uri": ".", "image": _section({} if image is None else image)},
            "model": _section(model),
            "sampling": _section({} if sampling is None else sampling),
            "workers": {"batch_size": batch_size},
            "quality": _section(quality),
        }
        config = JobConfig.from_dict(tree, origin="FluxMapper")
        for name in ("limit", "passthrough", "samplers", "template", "wildcards"):
            if getattr(config.prompts, name):
                raise JobError(f"FluxMapper: prompts.{name} is for jobs; leave it out")
        # Each stage would measure another one, which decides the last bits of images.
        if config.workers.batch_size == "auto":
            raise JobError("FluxMapper: batch_size = auto is for jobs, which measure it once for all workers; set one")
        self._prompts, self._image_config, self._batch_size = config.prompts, config.output.image, batch_size
        self._resize_references = config.sampling.resize_references
        self._prefix, self._exit_on_device_loss = prefix, exit_on_device_loss
        pipeline = make_pipeline(config.model)
        known = getattr(pipeline, "settings", None)
        check_settings(config, known)
        loras = RowLoras(config.model.loras, "").defaults
        self._maker = BatchMaker(pipeline, loras, Tiles.of(config.sampling), image_options=image_options(config))
        uri, guidance = f"{config.prompts.uri[0].rstrip('/')}/rows", pipeline.default_guidance
        self._parser = RowParser(config.prompts, config.sampling, uri, config.model.loras, known, guidance)
        settings = config.model
        if settings.quantization == "none":  # the pipeline may have chosen one: the record names it
            settings = settings.model_copy(update={"quantization": pipeline.precision["quantization"]})
        self._recorder = Recorder(settings, format_for(config.output), pipeline.default_t5_sequence_length)
        self._quality = config.quality
        self._scorer = make_scorer(config.quality) if config.quality else None
        self._added = pa.schema([*_ADDED_SCHEMA, *(_QUALITY_SCHEMA if config.quality else ())])

    def __call__(self, batch: _ColumnBatch) -> _ColumnBatch:
        """Make the images of a batch, a dict of NumPy columns or an Arrow table; return the same type.

        Each row is returned once for each of its images, in order, with the columns `image` (encoded bytes),
        `image_index`, `seed`, `width`, `height`, `clip_truncated`, `t5_truncated`, `sha256`, `status`, `error_type` and
        `error_message` of that image. An image that cannot be made is null, with status `failed` and the reason.
        Raises: SourceError for a batch without the columns that the settings name.
        """
        self._check_columns(_column_names(batch))
        rows = self._parse(batch)
        encoded: dict[tuple[int, int], _EncodedImage] = {
            (row.row, 0): (None, self._recorder.failed_row("", row)) for row in rows if isinstance(row, FailedRow)
        }
        encoded |= self._make([row for row in rows if isinstance(row, ImageRequest)])
        positions = sorted(encoded)
        columns: dict[str, list[Any]] = {"image": [encoded[position][0] for position in positions]}
        of_quality = _QUALITY_SCHEMA if self._quality else pa.schema([])
        records = [record_row(encoded[position][1], of_quality) for position in positions]
        columns |= {name: [record[name] for record in records] for name in self._added.names if name != "image"}
        named = {self._prefix + name: values for name, values in columns.items()}
        schema = pa.schema([field.with_name(self._prefix + field.name) for field in self._added])
        return with_columns(batch, [row for row, _ in positions], named, schema)

    def _check_columns(self, names: Sequence[str]) -> None:
        for field, column in {"prompt": "prompt", **self._prompts.columns}.items():
            if column not in names:
                raise SourceError(f"the batch has no column {column!r}; prompts.columns.{field} names the column")
        for name in self._added.names:
            if self._prefix + name in names and not (name in _REPLACED_COLUMNS and not self._prefix):
                raise SourceError(f"the batch has a column {self._prefix + name!r} already; choose another `prefix`")

    def _parse(self, batch: _ColumnBatch) -> list[ImageRequest | FailedRow]:
        """Validate the rows; a missing id is made from the prompt, so that a row always gives the same image."""
        prompt = self._prompts.columns.get("prompt", "prompt")
        return [
            self._parser.parse(values, row=row, default_id=_default_id(values, prompt))
            for row, values in enumerate(rows_of(batch, self._parser.columns))
        ]

    def _make(self, requests: Sequence[ImageRequest]) -> dict[tuple[int, int], _EncodedImage]:
        """Make the images of rows, with further tries for `quality`. Returns: them by (row, image index)."""
        tasks = [task for request in requests for task in tasks_of(request)]
        if self._quality is None:
            return {position: encoded for position, encoded, _ in self._make_tries(tasks)}
        tries: dict[tuple[int, int], list[tuple[_EncodedImage, Try]]] = {task.position: [] for task in tasks}
        while tasks:
            for position, encoded, score in self._make_tries(tasks):
                tries[position].append((encoded, Try(encoded[1].status == "success", score)))
            tasks = [
                replace(task, retry=task.retry + 1)
                for task in tasks
                if is_open([one for _, one in tries[task.position]], self._quality)
            ]
        return {position: _chosen(made, self._quality) for position, made in tries.items()}

    def _make_tries(self, tasks: Sequence[ImageTask]) -> Iterator[tuple[tuple[int, int], _EncodedImage, float | None]]:
        """Make one try of each image and yield it with its score; one batch is encoded while the next is made."""
        groups = list(batches(tasks, self._batch_size))
        made: list[tuple[ImageTask, Future[_EncodedImage], float | None]] = []
        with (
            ThreadPoolExecutor(_INPUT_IMAGE_READERS, "read") as readers,
            ThreadPoolExecutor(_ENCODERS, "encode") as encoders,
        ):
            images = InputImages(readers, self._read_images)
            for number, group in enumerate(groups):
                ready = images.join(group, groups[number + 1 : number + 1 + READ_AHEAD])
                outcomes = self._make_group(ready)
                if self._scorer:
                    outcomes = with_scores(outcomes, self._scorer, partial(self._recorder.outcome_fields, ""))
                made += [(one.task, encoders.submit(self._encode, one), one.score) for one in outcomes]
            for task, future, score in made:
                yield task.position, future.result(), score

    def _make_group(self, group: Sequence[ImageTask]) -> list[ImageOutcome]:
        try:
            return self._maker.make(group)
        except StoreError as error:  # the storage of a LoRA is unavailable: unlike a job, fail the rows and do not wait
            return [ImageOutcome(task, error) for task in group]
        except DeviceFatal:
            if self._exit_on_device_loss:
                os._exit(_DEVICE_FATAL_EXIT)  # after an exception Ray Data would try the next batch on the same device
            raise

    def _read_images(self, images: RowImages, size: tuple[int, int] | None) -> Mapping[str, Any] | Exception:
        try:
            options, resize = self._prompts.storage_options, self._resize_references
            return load_images(images, options, size, resize_references=resize)
        except StoreError as error:  # fails the row, as in _make_group
            return error

    def _encode(self, outcome: ImageOutcome) -> _EncodedImage:
        """Encode one image and record it as a job does, but without a key."""
        fields = self._recorder.outcome_fields("", outcome)
        if isinstance(outcome.result, Exception):
            return None, self._recorder.failed(fields, type(outcome.result).__name__, message_of(outcome.result))
        inside = {name: value for name, value in provenance(fields).items() if name != "key"}
        data = encode(outcome.result, self._image_config, inside)
        return data, self._recorder.made("", fields, data)


def _section(given: Any, **defaults: Any) -> Any:
    """Return a section as a plain dict with defaults; return other types unchanged, for validation to refuse."""
    return {**defaults, **given} if isinstance(given, Mapping) else given


def _chosen(made: Sequence[tuple[_EncodedImage, Try]], quality: QualityConfig) -> _EncodedImage:
    """Return the kept try of an image, with the columns of `quality`."""
    tries = [one for _, one in made]
    choice = choose(tries, quality)
    data, record = made[choice.retry][0]
    record = kept_record(record, tries, choice, quality)
    return data if record.status == "success" else None, record


def _default_id(values: Row | BadRow, column: str) -> str:
    prompt = values.reason if isinstance(values, BadRow) else values.get(column)
    return f"prompt-{hashlib.blake2b(repr(prompt).encode(), digest_size=8).hexdigest()}"


def _column_names(batch: _ColumnBatch) -> list[str]:
    """Return the column names of a batch. Raises: SourceError for other batch types."""
    if isinstance(batch, pa.Table):
        return list(batch.column_names)
    if isinstance(batch, dict):
        return list(batch)
    raise SourceError(f"the batch is a {type(batch).__name__}: use batch_format 'numpy' or 'pyarrow'")


def rows_of(batch: _ColumnBatch, names: Collection[str]) -> list[Row | BadRow]:
    """Return the rows of a batch as Python values, with its columns among `names`.

    An Arrow row with an unreadable cell becomes a BadRow, as in a file. A NaN of NumPy becomes None, since NumPy has no
    other value for a missing number, and so does the NA of pandas, which stands for a missing text.
    """
    present = [name for name in _column_names(batch) if name in names]
    if isinstance(batch, pa.Table):
        return [row for some in batch.select(present).to_batches() for row in python_rows(some)]
    columns = [_plain(batch[name]) for name in present]
    return [dict(zip(present, values, strict=True)) for values in zip(*columns, strict=True)]


def with_columns(
    batch: _ColumnBatch, rows: Sequence[int], columns: Mapping[str, Sequence[Any]], schema: pa.Schema
) -> _ColumnBatch:
    """Return the rows with the indices `rows` of a batch, with columns added or replaced.

    New columns of an Arrow table have the types of `schema`. New columns of a NumPy batch have dtype object, since they
    may contain None.
    """
    if isinstance(batch, pa.Table):
        kept = batch.drop_columns([name for name in batch.column_names if name in columns])
        parts = [_taken(kept, some) for some in _chunked(rows)]
        table = pa.concat_tables([kept.slice(0, 0), *parts])
        for name, values in columns.items():
            kind = schema.field(name).type
            chunks = [pa.array(some, kind) for some in _chunked(values)]
            table = table.append_column(schema.field(name), pa.chunked_array(chunks, kind))
        return table
    kept = {name: np.asarray(values)[list(rows)] for name, values in batch.items() if name not in columns}
    return kept | {name: _objects(values) for name, values in columns.items()}


def _taken(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """Return some rows of a table."""
    try:
        return table.take(pa.array(rows, pa.int64()))
    except pa.ArrowNotImplementedError:  # of a column whose type has no such kernel, such as string_view
        return pa.concat_tables([table.slice(row, 1) for row in rows])


def _chunked(values: Sequence[Any]) -> list[Sequence[Any]]:
    """Return values in chunks that each fit into one Arrow array."""
    return [values[first : first + _ROWS_PER_CHUNK] for first in range(0, len(values), _ROWS_PER_CHUNK)]


def _plain(values: Any) -> list[Any]:
    """Return a NumPy column as Python values; the cells of a column of lists are arrays too."""
    return [_plain_cell(value) for value in np.asarray(values).tolist()]


def _plain_cell(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _plain(value)
    return None if type(value).__name__ == "NAType" or (isinstance(value, float) and value != value) else value


def _objects(values: Sequence[Any]) -> np.ndarray[Any, Any]:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
