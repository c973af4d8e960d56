"""From the `model` section of a job file to a pipeline, in the process that will run it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flux_batch.config.schema import ModelConfig
from flux_batch.pipeline.heap import keep_freed_memory

if TYPE_CHECKING:
    from flux_batch.pipeline.pipeline import FluxImagePipeline

log = logging.getLogger(__name__)


def load_pipeline(model: ModelConfig) -> FluxImagePipeline:
    """Load FLUX. Raises: as FluxImagePipeline.from_pretrained."""
    from flux_batch.pipeline.pipeline import FluxImagePipeline
    from flux_batch.pipeline.precision import slow_dtype

    pipeline = FluxImagePipeline.from_pretrained(
        model.uri,
        torch_dtype=model.dtype,
        quantization=model.quantization,
        step_cache=model.step_cache,
        compile=model.compile,
        cuda_graphs=model.cuda_graphs,
        offload_text_encoders=model.offload_text_encoders,
        storage_options=model.storage_options,
        refresh=model.refresh,
    )
    if native := slow_dtype(pipeline.device, pipeline.torch_dtype):
        log.warning(
            "%s has no instructions for %s: images take several times as long as in %s, which dtype auto takes",
            pipeline.device,
            model.dtype,
            native,
        )
    prepare_process(pipeline)
    return pipeline


def prepare_process(pipeline: FluxImagePipeline) -> None:
    """Set this process up for a pipeline: on a CPU, what one step has freed is kept for the next."""
    if pipeline.device.type == "cpu":
        keep_freed_memory()
