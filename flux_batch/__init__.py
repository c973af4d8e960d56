"""Distributed batch image generation with FLUX.1-dev: Parquet prompts in, images and metadata out, each image once.

The folder, in the order in which data flows:

    cli       parse, call, exception -> exit code        worker    rows -> batches -> pictures -> commit
    job       the whole run on one screen                pipeline  prompts -> pictures, the only translator to model/
    config    the job file                               model_manager  files -> the parts of a model
                                                         model_source   a name or an address -> files here
    plan      data set -> shards                         model/    what FLUX computes
    engine/   where shards run                           storage/  bytes, tables, URLs
    stage     the pipeline in somebody's data pipeline   report/   what people read of a run
    records, errors: the nouns that cross a border, at the bottom

Imports only go down; tests/test_architecture.py holds that. Importing this package loads neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux_batch.config import JobConfig
    from flux_batch.job import run
    from flux_batch.model_manager import ModelManager
    from flux_batch.model_source import download_models
    from flux_batch.pipeline import FluxImagePipeline
    from flux_batch.stage import FluxMapper

__version__ = "0.1.0"

__all__ = ["FluxImagePipeline", "FluxMapper", "JobConfig", "ModelManager", "download_models", "run"]

_HOMES = {
    "FluxImagePipeline": "flux_batch.pipeline",
    "FluxMapper": "flux_batch.stage",
    "JobConfig": "flux_batch.config",
    "ModelManager": "flux_batch.model_manager",
    "download_models": "flux_batch.model_source",
    "run": "flux_batch.job",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
