"""From the `model` section of a job file to a pipeline, in the process that will run it."""

from __future__ import annotations

from flux_batch.config import ModelConfig
from flux_batch.image_pipeline import ImagePipeline


def load_pipeline(model: ModelConfig) -> ImagePipeline:
    """Load FLUX. Raises: as FluxImagePipeline.from_pretrained."""
    from flux_batch.pipeline import FluxImagePipeline

    return FluxImagePipeline.from_pretrained(
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
