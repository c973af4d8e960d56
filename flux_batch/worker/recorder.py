"""The metadata record of a requested image, made or failed; and the reverse, from a record to its task.

This module knows requests, records and the job, but not how images are made or where they are stored.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flux_batch.config.schema import JobConfig, ModelConfig, SamplingConfig
from flux_batch.errors import FluxBatchError, JobError, RowError, one_line
from flux_batch.output.formats import OutputFormat
from flux_batch.output.metadata import source_fields
from flux_batch.output.paths import image_key
from flux_batch.prompts.input_images import load_images
from flux_batch.records import (
    IMAGE_COLUMNS,
    FailedRow,
    ImageRecord,
    ImageRequest,
    InputImage,
    LoraUse,
    RowImages,
    split_names,
)
from flux_batch.redaction import public_uri
from flux_batch.sampling_params import SAMPLING_FIELDS, SamplingParams
from flux_batch.worker.batches import ImageTask
from flux_batch.worker.generate import SMALL_TILES, ImageOutcome, Tiles

# A message is a line in a table, not a log.
_MAX_MESSAGE_LENGTH = 1000


class Recorder:
    """Builds the records of a job; `text_length` is the default T5 sequence length, in tokens.

    It is None for a model without T5.
    """

    def __init__(self, model: ModelConfig, output_format: OutputFormat, text_length: int | None) -> None:
        self._model = model
        self._format = output_format
        self._text_length = text_length

    def outcome_fields(self, shard: str, outcome: ImageOutcome) -> dict[str, Any]:
        """Return the `fields` of the outcome of a task."""
        tile_size = outcome.tiles.size if outcome.tiles else None
        return self.fields(shard, outcome.task, tile_size, outcome.truncated or (None, None))

    def fields(
        self,
        shard: str,
        task: ImageTask,
        tile_size: int | None = None,
        truncated: tuple[bool | None, bool | None] = (None, None),
    ) -> dict[str, Any]:
        """Return the fields that the records of made and failed images have in common."""
        request = task.request
        fields: dict[str, Any] = {name: getattr(request.sampling, name) for name in SAMPLING_FIELDS}
        fields["t5_sequence_length"] = fields["t5_sequence_length"] or self._text_length
        return fields | {
            "key": image_key(shard, request.row, task.image_index),
            "id": request.id,
            "image_index": task.image_index,
            "prompt": request.prompt,
            "seed": task.seed,
            **request.images.names,
            **request.images.scales,
            **self._lora_fields(request.loras),
            "tile_size": tile_size,
            "clip_truncated": truncated[0],
            "t5_truncated": truncated[1],
            **self._model_fields(),
            "passthrough": request.passthrough,
        }

    def made(self, shard: str, fields: Mapping[str, Any], data: bytes, sources: Sequence[bytes] = ()) -> ImageRecord:
        """Return the record of a made image; `data` and `sources` are its bytes and those of its source images."""
        return _record(
            {**fields, "passthrough": {**fields["passthrough"], **source_fields(sources)}},
            status="success",
            file_name=self._format.file_name(shard, fields["key"]),
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
        )

    def failed(self, fields: Mapping[str, Any], error_type: str, error_message: str) -> ImageRecord:
        """Return the record of an image that could not be made."""
        return _record(fields, status="failed", error_type=error_type, error_message=error_message)

    def failed_row(self, shard: str, row: FailedRow) -> ImageRecord:
        """Return the record of an invalid row: one failed image, even if the row requested several."""
        return ImageRecord(
            key=image_key(shard, row.row, 0),
            id=row.id,
            image_index=0,
            prompt=row.prompt,
            **self._model_fields(),
            status="failed",
            error_type=row.error_type,
            error_message=row.error_message,
            passthrough=row.passthrough,
        )

    def _lora_fields(self, loras: tuple[LoraUse, ...]) -> dict[str, Any]:
        """Return the fields of an image's LoRAs; `lora` is "" for an image without any in a job with some."""
        if len(loras) == 1:
            return {"lora": loras[0].name, "lora_scale": loras[0].scale}
        if not loras and not self._model.loras:
            return {}
        return {"lora": ", ".join(f"{lora.name} ({lora.scale:g})" for lora in loras)}

    def _model_fields(self) -> dict[str, Any]:
        """Return the fields of the model, and of its settings that cost quality."""
        model = self._model
        return {"model": public_uri(model.uri), "quantization": model.quantization, "step_cache": model.step_cache}


def _record(fields: Mapping[str, Any], **outcome: Any) -> ImageRecord:
    sampling = SamplingParams(**{name: fields[name] for name in SAMPLING_FIELDS})
    others = {name: value for name, value in fields.items() if name not in SAMPLING_FIELDS}
    return ImageRecord(**others, **outcome, sampling=sampling)


def provenance(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record that are embedded in the image file."""
    return {name: value for name, value in fields.items() if name != "passthrough" and value is not None}


def message_of(error: Exception) -> str:
    """Return the message of an error in one line; for errors of libraries, with the line of code that raised them."""
    line = one_line(error)[:_MAX_MESSAGE_LENGTH]
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, FluxBatchError) or not frames:
        return line
    return f"{line} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"


def recorded_task(row: Mapping[str, Any], config: JobConfig) -> ImageTask:
    """Return the task of a made image from its metadata row.

    The images of the row are read. The seed is that of the kept try. Settings that older metadata lacks have their
    defaults.
    Raises: JobError if the row lacks information, or if one of its images cannot be read; StoreError.
    """
    sampling = {name: row.get(name, field.default) for name, field in SAMPLING_FIELDS.items()}
    request = ImageRequest(
        row=0,
        id=row["id"],
        prompt=row["prompt"],
        sampling=SamplingParams(**sampling),
        seeds=(row["seed"],),
        images=_recorded_images(row),
        loras=_recorded_loras(row, config.model),
    )
    if not request.images.counts:
        return ImageTask(request, 0)
    options, resize = config.prompts.storage_options, config.sampling.resize_references
    try:
        images = load_images(request.images, options, (row["width"], row["height"]), resize_references=resize)
    except RowError as error:
        raise JobError(f"{row['key']}: {error}") from error
    return ImageTask(request, 0, images)


def recorded_tiles(row: Mapping[str, Any], sampling: SamplingConfig) -> Tiles | None:
    """Return the tiles in which an image was decoded: the job's, or small ones after a lack of memory."""
    size = row.get("tile_size")
    if size is None:
        return None
    of_job = Tiles.of(sampling)
    return of_job if of_job and of_job.size == size else Tiles(size, SMALL_TILES.stride)


def _recorded_images(row: Mapping[str, Any]) -> RowImages:
    """Return the images that an image was made from. Raises: JobError if one cannot be found by its name."""
    found: dict[str, Any] = {}
    for column in IMAGE_COLUMNS:
        if names := row.get(column):
            is_several = isinstance(getattr(RowImages(), column), tuple)
            images = [_recorded_image(row, name, column) for name in (split_names(names) if is_several else [names])]
            if scales := row.get(f"{column}_scale"):
                images = [replace(one, scale=float(each)) for one, each in zip(images, scales.split(", "), strict=True)]
            found[column] = tuple(images) if is_several else images[0]
    return RowImages(**found)


def _recorded_image(row: Mapping[str, Any], name: str, column: str) -> InputImage:
    if name.startswith("sha256:"):
        raise JobError(
            f"{row['key']}: cannot be made again: its {column} was inside its row, and the metadata has only its hash"
        )
    _check_is_full(row, name, column)
    return InputImage(name=name, uri=name, column=column)


def _recorded_loras(row: Mapping[str, Any], model: ModelConfig) -> tuple[LoraUse, ...]:
    """Return the LoRAs of an image: none, one by its name, or all of its job.

    Raises: JobError if one cannot be found by its name.
    """
    name, scale = row.get("lora"), row.get("lora_scale")
    if not name:
        return ()
    of_job = tuple(LoraUse(name=lora.name, uri=lora.uri, scale=lora.scale) for lora in model.loras)
    if scale is None:
        return of_job
    uris = {lora.name: lora.uri for lora in of_job}
    if name not in uris:
        _check_is_full(row, name, "lora")
    return (LoraUse(name=name, uri=uris.get(name, name), scale=scale),)


def _check_is_full(row: Mapping[str, Any], name: str, column: str) -> None:
    """Raise JobError for a relative name: the metadata does not contain the prompts file of its row."""
    if not name.startswith("/") and "://" not in name:
        raise JobError(
            f"{row['key']}: cannot be made again: its {column} {name} is relative to its prompts file, which the "
            "metadata does not name"
        )
