"""The dtype and the kernels of a run: the first worker records them, and all others use its dtype.

A resumed run may use other machines, which would choose another dtype and make different images. Kernels depend on the
machine, so a worker with different ones only logs a warning.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable
from dataclasses import asdict

from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.errors import AlreadyExists, DamagedObject, JobError, NotFound, one_line
from flux_batch.output.paths import JOB, PRECISION
from flux_batch.records import Kernels
from flux_batch.storage.store import Store
from flux_batch.worker.protocol import ImagePipeline

log = logging.getLogger(__name__)

# The guidance of jobs without one in earlier versions, which did not take it from the model.
_FORMER_GUIDANCE = 3.5


def load_settled(
    store: Store, model: ModelConfig, make_pipeline: Callable[[ModelConfig], ImagePipeline]
) -> tuple[ImagePipeline, ModelConfig]:
    """Load a pipeline in the dtype of the run, which the first worker settles. Raises: StoreError.

    Returns: the pipeline, and the section `model` with that dtype in place of `auto`.
    """
    settled = settled_model(store, model)
    pipeline = make_pipeline(settled)
    chosen = _precision_of(pipeline, model)
    mine = model.model_copy(update=chosen) if model.dtype == "auto" else model
    if not store.exists(PRECISION) and _write_record(store, chosen, pipeline.kernels):
        log.info("the run computes in %s, on %s", _name_of(mine), pipeline.kernels)
        return pipeline, mine
    if settled.dtype == "auto":  # another worker was faster
        settled = settled_model(store, model)
        if settled != mine:
            del pipeline  # a device may not have memory for two
            gc.collect()
            pipeline = make_pipeline(settled)
    _warn_of_differences(store, model, settled, pipeline)
    return pipeline, settled


def _precision_of(pipeline: ImagePipeline, model: ModelConfig) -> dict[str, str]:
    """Return the dtype of a pipeline, and its quantization unless the job sets one."""
    names = ("dtype", "quantization") if model.quantization == "none" else ("dtype",)
    return {name: pipeline.precision[name] for name in names}


def _write_record(store: Store, chosen: dict[str, str], kernels: Kernels) -> bool:
    """Record the precision and kernels of the run. Returns: False if another worker has. Raises: StoreError."""
    try:
        store.put_if_absent(PRECISION, json.dumps({**chosen, "kernels": asdict(kernels)}).encode())
    except AlreadyExists:
        return False
    return True


def _warn_of_differences(store: Store, model: ModelConfig, settled: ModelConfig, pipeline: ImagePipeline) -> None:
    """Log differences from the dtype native to this device, and from the first worker's kernels.

    Raises: StoreError.
    """
    if model.dtype == "auto" and pipeline.native_dtype != settled.dtype:
        log.warning(
            "this worker computes in %s, like the first worker of the run; its device computes natively in %s",
            _name_of(settled),
            pipeline.native_dtype,
        )
    if (first := kernels_of_run(store)) and first != pipeline.kernels:
        log.warning(
            "this worker computes on %s, the first worker of the run on %s: the last bits of images may differ",
            pipeline.kernels,
            first,
        )


def kernels_of_run(store: Store) -> Kernels | None:
    """Return the kernels of the first worker of a run; None if there is no record of them. Raises: StoreError."""
    try:
        return Kernels.of_record(json.loads(store.read(PRECISION)))
    except (NotFound, ValueError, RecursionError):
        return None


def with_model_of_run(store: Store, config: JobConfig) -> JobConfig:
    """Return a job with its open settings taken from its run: dtype, `compile`, guidance.

    Raises: StoreError, JobError.
    """
    open_keys = [key for key in ("dtype", "compile") if getattr(config.model, key) == "auto"]
    if not open_keys and config.sampling.embedded_guidance is not None:
        return config
    try:
        before = JobConfig.from_yaml(store.read(JOB).decode(), origin=store.url(JOB))
    except NotFound:
        return config
    chosen = {key: getattr(before.model, key) for key in open_keys}
    sampling = config.sampling
    if before.sampling.embedded_guidance == _FORMER_GUIDANCE:
        sampling = sampling.for_model(_FORMER_GUIDANCE)
    return config.model_copy(update={"model": config.model.model_copy(update=chosen), "sampling": sampling})


def settled_job(store: Store, config: JobConfig) -> JobConfig:
    """Return a job with the settled dtype of its run in place of `auto`. Raises: StoreError."""
    return config.model_copy(update={"model": settled_model(store, config.model)})


def settled_model(store: Store, model: ModelConfig) -> ModelConfig:
    """Return the section with the settled dtype in place of `auto`, if there is one. Raises: StoreError."""
    if model.dtype != "auto":
        return model
    try:
        data = store.read(PRECISION)
    except NotFound:
        return model
    try:
        record = json.loads(data)
        names = ("dtype", "quantization") if model.quantization == "none" else ("dtype",)
        chosen = {name: record[name] for name in names if name in record}
        settled = ModelConfig.model_validate({**model.model_dump(), **chosen})
        if settled.dtype == "auto":
            raise ValueError("it names no dtype")
    except (ValueError, KeyError, TypeError, RecursionError, JobError) as error:
        raise DamagedObject(f"{store.url(PRECISION)}: is damaged ({one_line(error)}); delete it") from error
    return settled


def _name_of(model: ModelConfig) -> str:
    return model.dtype if model.quantization == "none" else f"{model.dtype}, quantization {model.quantization}"
