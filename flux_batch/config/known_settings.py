"""The check that a pipeline knows every changed setting of a job."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel

from flux_batch.config.schema import JobConfig
from flux_batch.errors import InvalidSetting, JobError, did_you_mean
from flux_batch.records import IMAGE_COLUMNS, WEIGHTED_COLUMNS
from flux_batch.sampling_params import SAMPLING_FIELDS

# Keys of `sampling` and `model` that do not concern a pipeline, or that every pipeline must know.
_OF_EVERY_PIPELINE = frozenset(
    {
        *("width", "height", "seed", "num_images_per_prompt", "size_from_reference"),
        *("uri", "storage_options", "refresh", "dtype", "pipeline", "pipeline_options"),
    }
)
# Arguments of the call besides the sampling fields, and keys of the section `model`.
_OF_CALL = (
    "tiled",
    "tile_size",
    "tile_stride",
    "paste_back",
    "resize_references",
    *(f"{name}_scale" for name in WEIGHTED_COLUMNS),
)
_OF_MODEL = (
    "variant",
    "quantization",
    "step_cache",
    "compile",
    "cuda_graphs",
    "offload_text_encoders",
    "loras",
    "controlnets",
    "redux",
    "ip_adapter",
)
# All settings that a pipeline may declare.
_SETTINGS = (
    *(name for name in SAMPLING_FIELDS if name not in _OF_EVERY_PIPELINE),
    *(*IMAGE_COLUMNS, *_OF_CALL, *_OF_MODEL),
)


def check_settings(config: JobConfig, known: Collection[str] | None) -> None:
    """Raise InvalidSetting for a setting of a job that its pipeline does not know; None knows all."""
    for section in (config.sampling, config.model) if known is not None else ():
        for name in _changed(section):
            if name not in _OF_EVERY_PIPELINE and name not in (known or ()):
                where = "sampling" if section is config.sampling else "model"
                raise InvalidSetting(
                    f"{where}.{name}: the pipeline {config.model.pipeline} does not know it{known_words(known or ())}",
                    field=name,
                )


def declared_settings(pipeline: Any) -> Collection[str] | None:
    """Return the `settings` of a pipeline or its class; None if it declares none.

    Raises: JobError for a name that is not a setting.
    """
    declared = getattr(pipeline, "settings", None)
    if not isinstance(declared, (set, frozenset, list, tuple)):
        return None
    for name in declared:
        if name not in _SETTINGS:
            hint = did_you_mean(str(name), _SETTINGS) or f"; there are {', '.join(_SETTINGS)}"
            raise JobError(f"settings of the pipeline: {name!r} is not a setting of a job{hint}")
    return frozenset(declared)


def known_words(known: Collection[str]) -> str:
    """Return the end of a message that lists the settings a pipeline knows."""
    return f"; leave it out; it knows {', '.join(sorted({*known, 'width', 'height'}))}"


def _changed(section: BaseModel) -> list[str]:
    fields: Mapping[str, Any] = type(section).model_fields
    return [name for name, field in fields.items() if getattr(section, name) != field.get_default()]
