"""The dtype of a run whose job says `auto`: the first worker settles it, all other workers keep it.

A resumed run may use other machines, which would choose another dtype and make other images.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.errors import AlreadyExists, JobError, NotFound, StoreError, one_line
from flux_batch.output.paths import JOB, PRECISION
from flux_batch.storage.store import Store
from flux_batch.worker.protocol import ImagePipeline

log = logging.getLogger(__name__)


def load_settled(
    store: Store, model: ModelConfig, make_pipeline: Callable[[ModelConfig], ImagePipeline]
) -> tuple[ImagePipeline, ModelConfig]:
    """Load a pipeline in the dtype of the run, which the first worker settles. Raises: StoreError.

    Returns: the pipeline, and the `model` section with that dtype instead of `auto`.
    """
    settled = settled_model(store, model)
    pipeline = make_pipeline(settled)
    if model.dtype != "auto":
        return pipeline, model
    if settled.dtype == "auto":
        chosen = {"dtype": pipeline.precision["dtype"]}
        if model.quantization == "none":
            chosen["quantization"] = pipeline.precision["quantization"]
        settled = model.model_copy(update=chosen)
        try:
            store.put_if_absent(PRECISION, json.dumps(chosen).encode())
            log.info("the run computes in %s", _name_of(settled))
            return pipeline, settled
        except AlreadyExists:  # another worker was faster
            mine, settled = settled, settled_model(store, model)
            if settled == mine:
                return pipeline, settled
            pipeline = make_pipeline(settled)
    if pipeline.native_dtype != settled.dtype:
        log.warning(
            "this worker computes in %s, as the run began; its device computes natively in %s",
            _name_of(settled),
            pipeline.native_dtype,
        )
    return pipeline, settled


def with_model_of_run(store: Store, config: JobConfig) -> JobConfig:
    """Return a job with the dtype and `compile` of its run's beginning for `auto`. Raises: StoreError, JobError."""
    open_keys = [key for key in ("dtype", "compile") if getattr(config.model, key) == "auto"]
    if not open_keys:
        return config
    try:
        before = JobConfig.from_yaml(store.read(JOB).decode(), origin=store.url(JOB))
    except NotFound:
        return config
    chosen = {key: getattr(before.model, key) for key in open_keys}
    return config.model_copy(update={"model": config.model.model_copy(update=chosen)})


def settled_job(store: Store, config: JobConfig) -> JobConfig:
    """Return a job with the settled dtype of its run instead of `auto`. Raises: StoreError."""
    return config.model_copy(update={"model": settled_model(store, config.model)})


def settled_model(store: Store, model: ModelConfig) -> ModelConfig:
    """Return the section with the settled dtype instead of `auto`, if there is one. Raises: StoreError."""
    if model.dtype != "auto":
        return model
    try:
        data = store.read(PRECISION)
    except NotFound:
        return model
    try:
        chosen = json.loads(data)
        if model.quantization != "none":
            chosen = {"dtype": chosen["dtype"]}
        settled = ModelConfig.model_validate({**model.model_dump(), **chosen})
        if settled.dtype == "auto":
            raise ValueError("dtype is auto")
    except (ValueError, KeyError, TypeError, RecursionError, JobError) as error:
        raise StoreError(f"{store.url(PRECISION)}: is damaged ({one_line(error)}); delete it") from error
    return settled


def _name_of(model: ModelConfig) -> str:
    return model.dtype if model.quantization == "none" else f"{model.dtype}, quantization {model.quantization}"
