"""The batch size of a run whose job says `auto`: measured once, then read by every worker.

A large image alone uses a device fully, so a batch gains nothing; small images gain. The first worker measures with
images of the job's size and writes the number into the run. All other workers and later invocations read it, since the
batch size can change the last bits of an image.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flux_batch.config.schema import SamplingConfig
from flux_batch.errors import AlreadyExists, DamagedObject, NotFound, OutOfMemory
from flux_batch.images import blank_image
from flux_batch.output.paths import BATCH_SIZE
from flux_batch.sampling_params import call_arguments
from flux_batch.storage.store import Store
from flux_batch.worker.protocol import ImagePipeline

_BATCH_SIZES = (1, 2, 4, 8, 16)
# Enough steps for the transformer to outweigh text encoding and decoding, as it does in a whole image.
_MEASURED_STEPS = 4
# A larger batch must reduce the time per image at least to this share, since a killed worker loses a whole batch.
_MAX_TIME_RATIO = 0.97

log = logging.getLogger(__name__)


def remembered_batch_size(store: Store, measure: Callable[[], int]) -> int:
    """Return the batch size of the run; measure and store it if there is none. Raises: StoreError."""
    try:
        return _read(store)
    except NotFound:
        size = measure()
    try:
        store.put_if_absent(BATCH_SIZE, json.dumps({"batch_size": size}).encode())
    except AlreadyExists:
        return _read(store)
    log.info("measured batch size: %d", size)
    return size


def measured_batch_size(
    pipeline: ImagePipeline,
    sampling: SamplingConfig,
    on_progress: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
    image_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> int:
    """Measure the smallest batch size beyond which a larger one gains little.

    Sizes are 1, 2, 4, 8, 16, up to the first that does not fit into memory. on_progress: called after each size.
    clock: returns seconds. image_options: further arguments of a call with images, by column.
    """
    best, best_s = 1, float("inf")
    for size in _BATCH_SIZES:
        try:
            # The first call of two is a warm-up.
            image_s = min(_call_s(pipeline, sampling, size, clock, image_options or {}) for _ in range(2)) / size
        except OutOfMemory:
            break
        finally:
            on_progress()
        if image_s > _MAX_TIME_RATIO * best_s:
            break
        best, best_s = size, image_s
    return best


def measured_images_per_s(
    pipeline: ImagePipeline,
    sampling: SamplingConfig,
    size: int,
    clock: Callable[[], float] = time.monotonic,
    image_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> float:
    """Measure the images per second of whole calls with `size` images; the first of two is a warm-up."""
    steps = sampling.num_inference_steps
    return size / [_call_s(pipeline, sampling, size, clock, image_options or {}, steps) for _ in range(2)][-1]


def _call_s(
    pipeline: ImagePipeline,
    sampling: SamplingConfig,
    size: int,
    clock: Callable[[], float],
    image_options: Mapping[str, Mapping[str, Any]],
    max_steps: int = _MEASURED_STEPS,
) -> float:
    steps = min(max_steps, sampling.num_inference_steps)
    params = replace(sampling.params(), num_inference_steps=steps, denoising_strength=1.0)  # there is no input image
    blank = blank_image(params.width, params.height)
    images: dict[str, Any] = {
        name: [blank if count == 1 else [blank] * count] * size
        for name, count in Counter(pipeline.needed_images).items()
    }
    options = {key: value for name in images for key, value in image_options.get(name, {}).items()}
    started = clock()
    pipeline(
        [f"image {number}" for number in range(size)],
        seed=list(range(size)),
        output_type="np",
        **images,
        **options,
        **call_arguments([params] * size),
    )
    return clock() - started


def _read(store: Store) -> int:
    try:
        size = int(json.loads(store.read(BATCH_SIZE))["batch_size"])
        if size < 1:
            raise ValueError(f"batch_size is {size}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedObject(f"{store.url(BATCH_SIZE)}: is damaged ({error!r}); delete it") from error
    return size
