"""The way from a job's `model` section to a pipeline, in its process."""

from __future__ import annotations

import ctypes
import logging
import sys
import warnings
from typing import TYPE_CHECKING

from flux_batch.config.schema import ModelConfig
from flux_batch.pipeline.weights import check_weights

if TYPE_CHECKING:
    from flux_batch.pipeline.pipeline import FluxImagePipeline

# Names and values of mallopt(3), glibc's malloc.h; 32 MB is the most it takes for a block. A thread's heap is 64 MB:
# blocks that do not fit there are still given back.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_KEPT_BLOCK = 32 << 20
_LARGEST_KEPT_HEAP = 2**31 - 1

log = logging.getLogger(__name__)


def load_pipeline(model: ModelConfig, num_gpus: float | None = None) -> FluxImagePipeline:
    """Load FLUX onto the GPU of this process, if there is one.

    num_gpus: the GPUs that this process should have; with 0 it computes on the CPU, and where it should have some and
    has none it says so, or refuses a model too large for a CPU. None leaves it open.
    Raises: JobError, and the errors of FluxImagePipeline.from_pretrained.
    """
    from flux_batch.pipeline.pipeline import FluxImagePipeline
    from flux_batch.pipeline.precision import default_device, slow_dtype

    device = "cpu" if num_gpus == 0 else default_device().type
    if num_gpus and device == "cpu":
        no_gpu = "torch finds no GPU on this node"
        check_weights(model, no_gpu)
        log.warning("%s: the model runs on the CPU", no_gpu)
    pipeline = FluxImagePipeline.from_pretrained(
        model.uri,
        torch_dtype=model.dtype,
        device=device,
        quantization=model.quantization,
        step_cache=model.step_cache,
        compile=None if model.compile == "auto" else model.compile,
        cuda_graphs=model.cuda_graphs,
        offload_text_encoders=model.offload_text_encoders,
        storage_options=model.storage_options,
        refresh=model.refresh,
        variant=model.variant,
        controlnets=[net.uri for net in model.controlnets],
    )
    nets = model.controlnets
    settings = ([getattr(net, name) for net in nets] for name in ("scale", "start", "end", "mode"))
    pipeline.controlnets.check_modes(pipeline.controlnets.settings(len(nets), *settings))
    if native := slow_dtype(pipeline.device, pipeline.torch_dtype):
        log.warning(
            "%s has no instructions for %s: images take several times as long as in %s, which dtype auto uses",
            pipeline.device,
            model.dtype,
            native,
        )
    prepare_process(pipeline)
    return pipeline


def prepare_process(pipeline: FluxImagePipeline) -> None:
    """Set this process up for a loaded pipeline.

    Prompts that are cut are not warned of, since each image's record says it. On a CPU, the memory that one step has
    freed is kept for the next.
    """
    warnings.filterwarnings("ignore", "a prompt is longer than", UserWarning)
    if pipeline.device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Keep freed blocks of up to 32 MB in this process, 2 GB in all. Returns: False without glibc.

    By default glibc gives the larger blocks back to the system, which clears every page before it hands it out again:
    for each step the same ones, a tenth of the time of an image. Call it once the model is loaded, so that the memory
    that loading needed for a while is not kept.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    kept = (_M_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK), (_M_TRIM_THRESHOLD, _LARGEST_KEPT_HEAP)
    return all(mallopt(name, value) for name, value in kept)
