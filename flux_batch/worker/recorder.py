"""What is written down of a requested image, made or failed.

Knows requests, records and the job; does not know how images are made or where they lie.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flux_batch.config.schema import ModelConfig
from flux_batch.errors import FluxBatchError
from flux_batch.output.layouts import Layout, image_key
from flux_batch.records import SAMPLING_FIELDS, FailedRow, ImageRecord, LoraUse
from flux_batch.redaction import public_text, public_uri
from flux_batch.worker.batches import Item

# A message is a line in a table, not a log.
LONGEST_MESSAGE = 1000


class Recorder:
    """Writes the records of a job: `lora_words` says what an image was made with, `text_length` T5's default."""

    def __init__(
        self,
        model: ModelConfig,
        layout: Layout,
        text_length: int,
        lora_words: Callable[[tuple[LoraUse, ...]], Mapping[str, Any]],
    ) -> None:
        self._model = model
        self._layout = layout
        self._text_length = text_length
        self._lora_words = lora_words

    def fields(
        self, shard: str, item: Item, tile_size: int | None, truncated: tuple[bool | None, bool | None]
    ) -> dict[str, Any]:
        """Give the fields of a record that are known before it is known how the image turned out."""
        request = item.request
        fields: dict[str, Any] = {name: getattr(request.sampling, name) for name in SAMPLING_FIELDS}
        fields["t5_sequence_length"] = fields["t5_sequence_length"] or self._text_length
        return fields | {
            "key": image_key(shard, request.row, item.image_index),
            "id": request.id,
            "image_index": item.image_index,
            "prompt": request.prompt,
            "seed": request.seeds[item.image_index],
            "input_image": request.input_image.name if request.input_image else None,
            **self._lora_words(request.loras),
            "tile_size": tile_size,
            "clip_truncated": truncated[0],
            "t5_truncated": truncated[1],
            **self._model_words(),
            "passthrough": request.passthrough,
        }

    def made(self, shard: str, fields: Mapping[str, Any], data: bytes) -> ImageRecord:
        """Record an image by its encoded bytes."""
        return ImageRecord(
            **fields,
            status="success",
            file_name=self._layout.file_name(shard, fields["key"]),
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
        )

    def failed(self, fields: Mapping[str, Any], error_type: str, error_message: str) -> ImageRecord:
        """Record why there is no image."""
        return ImageRecord(**fields, status="failed", error_type=error_type, error_message=error_message)

    def failed_row(self, shard: str, row: FailedRow) -> ImageRecord:
        """Record a row that never became a request: one failed image, whatever number it asked for."""
        return ImageRecord(
            key=image_key(shard, row.row, 0),
            id=row.id,
            image_index=0,
            prompt=row.prompt,
            **self._model_words(),
            status="failed",
            error_type=row.error_type,
            error_message=row.error_message,
            passthrough=row.passthrough,
        )

    def _model_words(self) -> dict[str, Any]:
        """Say which model made an image, and what was traded for speed or memory."""
        model = self._model
        return {"model": public_uri(model.uri), "quantization": model.quantization, "step_cache": model.step_cache}


def provenance(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Choose what an image says of itself: what it was made with."""
    return {name: value for name, value in fields.items() if name != "passthrough" and value is not None}


def message_of(error: Exception) -> str:
    """Say what went wrong in one line, with the place for errors that are not meant for users."""
    line = " ".join(public_text(str(error)).split())[:LONGEST_MESSAGE]
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, FluxBatchError) or not frames:
        return line
    return f"{line} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
