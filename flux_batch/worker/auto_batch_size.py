"""How many images a forward pass should make, where the job leaves that to us: measured once a run, and remembered.

Large images fill a device one at a time, and a batch only makes them wait for each other; small ones do not. The
first worker measures on images of the job's own size and writes the number down; all others, and all that go on with
the run, take that one, since what is made together decides the last bit of an image.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable

from flux_batch.config.schema import SamplingConfig
from flux_batch.errors import AlreadyExists, NotFound, OutOfMemory, StoreError
from flux_batch.output.paths import BATCH_SIZE
from flux_batch.storage.store import Store
from flux_batch.worker.protocol import ImagePipeline

SIZES = (1, 2, 4, 8, 16)
# Enough steps for the transformer to outweigh texts and decoding, as it does in a whole image.
STEPS = 4
# A batch that saves less is not worth what a kill of it costs.
WORTH = 0.97

log = logging.getLogger(__name__)


def remembered_batch_size(store: Store, measure: Callable[[], int]) -> int:
    """Read the number that the run has settled on, or measure it and write it down. Raises: StoreError."""
    try:
        return _read(store)
    except NotFound:
        size = measure()
    try:
        store.put_if_absent(BATCH_SIZE, json.dumps({"batch_size": size}).encode())
    except AlreadyExists:
        return _read(store)
    log.info("batches of %d, as measured", size)
    return size


def measured_batch_size(
    pipeline: ImagePipeline,
    sampling: SamplingConfig,
    on_progress: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Return the smallest of SIZES after which images come hardly faster, or no longer fit into memory."""
    best, best_s = 1, float("inf")
    for size in SIZES:
        try:
            # The first of two warms up.
            image_s = min(_seconds(pipeline, sampling, size, clock) for _ in range(2)) / size
        except OutOfMemory:
            break
        finally:
            on_progress()
        if image_s > WORTH * best_s:
            break
        best, best_s = size, image_s
    return best


def _seconds(pipeline: ImagePipeline, sampling: SamplingConfig, size: int, clock: Callable[[], float]) -> float:
    started = clock()
    pipeline(
        [f"image {number}" for number in range(size)],
        negative_prompt=[sampling.negative_prompt] * size,
        width=sampling.width,
        height=sampling.height,
        num_inference_steps=min(STEPS, sampling.num_inference_steps),
        embedded_guidance=[sampling.embedded_guidance] * size,
        cfg_scale=[sampling.cfg_scale] * size,
        t5_sequence_length=sampling.t5_sequence_length,
        seed=list(range(size)),
        output_type="np",
    )
    return clock() - started


def _read(store: Store) -> int:
    try:
        size = int(json.loads(store.read(BATCH_SIZE))["batch_size"])
        if size < 1:
            raise ValueError(f"a batch of {size}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{store.url(BATCH_SIZE)}: not a batch size of this program ({error!r}); delete it") from error
    return size
