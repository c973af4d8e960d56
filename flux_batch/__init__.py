"""Distributed batch image generation with FLUX.1-dev: Parquet prompts in, images and metadata out, each image once.

The folder, in the order in which data flows:

    cli        parse, call, exception -> exit code     mapper     the pipeline as a stage of Ray Data
    job        a whole run on one screen               pipeline/  prompts -> images, the only caller of model/
    config/    the job file                            model/     what FLUX computes
    prompts/   rows in                                 download/  a model onto this machine
    plan/      data set -> shards                      output/    the data set on its way out
    engine/    where shards run                        storage/   bytes
    worker/    rows -> batches -> images -> commit     report/    what people read about a run
    resume     the run that an output holds            records, images, telemetry, errors: at the bottom

Imports only go down, which tests/test_architecture.py checks. Importing this package loads neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux_batch.config.schema import JobConfig
    from flux_batch.download.models import download_models
    from flux_batch.job import load_job, run
    from flux_batch.mapper import FluxMapper
    from flux_batch.pipeline.model_manager import ModelManager
    from flux_batch.pipeline.pipeline import FluxImagePipeline

__version__ = "0.1.0"

__all__ = ["FluxImagePipeline", "FluxMapper", "JobConfig", "ModelManager", "download_models", "load_job", "run"]

_HOMES = {
    "FluxImagePipeline": "flux_batch.pipeline.pipeline",
    "FluxMapper": "flux_batch.mapper",
    "JobConfig": "flux_batch.config.schema",
    "ModelManager": "flux_batch.pipeline.model_manager",
    "download_models": "flux_batch.download.models",
    "load_job": "flux_batch.job",
    "run": "flux_batch.job",
}


def __getattr__(name: str) -> Any:
    """Load a public name on its first use."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
