"""Batch image generation with FLUX.1-dev: prompts in, images and metadata out, each image once.

Images in Python. `demo` is the packaged small model, made for 128 x 128; the folder of another model works as well:

>>> from flux_batch import FluxImagePipeline
>>> pipe = FluxImagePipeline.from_pretrained("demo", device="cpu")
>>> image = pipe(prompt="a red star", height=64, width=64, num_inference_steps=2, seed=6)
>>> image.size
(64, 64)

A job, as `flux-batch run` runs it, from a file (`run("job.yaml")`) or a mapping, on Ray or in this process:

>>> from flux_batch import run
>>> from flux_batch.engine.local import LocalEngine
>>> job = {"prompts": {"uri": "prompts.csv"}, "output": {"uri": "out/cats"}, "model": {"uri": "demo"}}
>>> report = run({**job, "sampling": {"width": 64, "height": 64, "num_inference_steps": 2}}, engine=LocalEngine())
>>> report.num_images, report.num_failed, report.exit_code
(2, 0, 0)

FluxMapper is a stage for Ray Data, download_models fetches models, ModelManager serves scripts of DiffSynth-Studio.
Importing this package loads neither torch nor ray.
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
