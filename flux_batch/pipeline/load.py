"""Loading of a job's `model` section as a pipeline, and a check of its weights.

torch is imported only when a pipeline is loaded, so that the driver of a run can check without torch.
"""

from __future__ import annotations

import ctypes
import gc
import glob
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from flux_batch.config.schema import ModelConfig
from flux_batch.download.models import (
    find_local_model,
    is_silent_hub,
    local_model,
    local_path,
    model_listing,
    source_kind,
)
from flux_batch.errors import CheckpointError, DeviceFatal, JobError, NotFound, StoreError, StoreRefused, one_line
from flux_batch.model.checkpoint.checkpoint import model_files
from flux_batch.model.checkpoint.detect import find_parts
from flux_batch.pipeline.errors import checkpoint_errors

if TYPE_CHECKING:
    from flux_batch.pipeline.checked import CheckedPipeline
    from flux_batch.pipeline.pipeline import FluxImagePipeline

# Names and values of mallopt(3), glibc's malloc.h; 32 MB is the largest block threshold that it accepts. A thread's
# heap has 64 MB: blocks that do not fit into it are still returned to the system.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_KEPT_BLOCK = 32 << 20
_LARGEST_KEPT_HEAP = 2**31 - 1
# The demo model has 0.02 GB; FLUX.1 in its narrowest encodings has 7 GB with its text encoders.
MAX_BYTES_ON_CPU = 2 * 10**9

log = logging.getLogger(__name__)


def load_pipeline(model: ModelConfig, num_gpus: float | None = None) -> FluxImagePipeline | CheckedPipeline:
    """Load FLUX, or the pipeline that the section names, onto this process's GPU, if any.

    num_gpus: the GPUs that this process should have; 0 computes on the CPU. If it should have a GPU but has none, a
    warning says so, or a model that is too large for a CPU is refused. None accepts either device.
    Raises: JobError; DeviceFatal for an assigned GPU that does not work; the errors of
    FluxImagePipeline.from_pretrained.
    """
    from flux_batch.pipeline.checked import open_pipeline
    from flux_batch.pipeline.pipeline import FluxImagePipeline
    from flux_batch.pipeline.precision import default_device, slow_dtype

    # A worker of an earlier run in this process is in cycles: its model would stay in memory beside this one.
    gc.collect()
    device = "cpu" if num_gpus == 0 else default_device().type
    if num_gpus and device == "cpu":
        _go_on_without_gpu(model)
    if model.pipeline is not None:
        return open_pipeline(model, device)
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
    _refresh_beside(model, pipeline)
    if model.redux:
        pipeline.load_redux(model.redux.uri, model.redux.image_encoder, model.redux.scale)
    if adapter := model.ip_adapter:
        pipeline.load_ip_adapter(adapter.uri, image_encoder=adapter.image_encoder, scale=adapter.scale)
    if native := slow_dtype(pipeline.device, pipeline.torch_dtype):
        log.warning(
            "%s has no instructions for %s: images take several times as long as in %s, which dtype auto uses",
            pipeline.device,
            model.dtype,
            native,
        )
    prepare_process(pipeline)
    return pipeline


def _go_on_without_gpu(model: ModelConfig) -> None:
    """Log that a model runs on the CPU. Raises: DeviceFatal for a GPU that does not start; as check_weights."""
    import torch

    try:
        torch.cuda.init()
        reason = "no CUDA device"
    except Exception as error:  # of several classes: of the driver, of torch, or of a torch for CPUs
        reason = one_line(error)
    # Ray assigns a GPU by CUDA_VISIBLE_DEVICES, even if the GPUs of a node are only declared: then there is no device
    # file, and a small model runs on the CPU. With a device file the node is at fault, and other workers go on.
    assigned = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if torch.version.cuda and assigned not in ("", "-1") and glob.glob("/dev/nvidia[0-9]*"):
        raise DeviceFatal(f"torch cannot use the GPU of this process, CUDA_VISIBLE_DEVICES={assigned}: {reason}")
    no_gpu = f"torch finds no GPU on this node ({reason})"
    check_weights(model, no_gpu)
    log.warning("%s: the model runs on the CPU", no_gpu)


def _refresh_beside(model: ModelConfig, pipeline: FluxImagePipeline) -> None:
    """Fetch the files beside a model again, if the job asks for a refresh."""
    if not model.refresh:
        return
    for lora in model.loras:
        pipeline.loras.fetch(lora.uri, refresh=True)
    for reader in (model.redux, model.ip_adapter):
        for uri in (*reader.uris, reader.image_encoder) if reader else ():
            if uri:
                local_path(uri, model.storage_options, refresh=True)


def prepare_process(pipeline: FluxImagePipeline) -> None:
    """Set this process up for a loaded pipeline.

    There are no warnings of truncated prompts, since each image's record shows them. On a CPU, the memory that one step
    frees is kept for the next.
    """
    warnings.filterwarnings("ignore", "a prompt is longer than", UserWarning)
    if pipeline.device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Keep freed blocks of up to 32 MB in this process, 2 GB in all. Returns: False without glibc.

    By default glibc returns larger blocks to the system, which clears every page before it is used again. Every step
    would allocate the same blocks anew, which takes a tenth of the time of an image. Call this after the model is
    loaded, so that temporary memory of loading is not kept.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    kept = (_M_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK), (_M_TRIM_THRESHOLD, _LARGEST_KEPT_HEAP)
    return all(mallopt(name, value) for name, value in kept)


def check_weights(model: ModelConfig, no_gpu: str = "") -> None:
    """Check that the model of a job and the files it loads beside it exist; fetch nothing.

    no_gpu: the reason why the model would run on a CPU although the job asks for GPUs; a large model is then refused. A
    remote that cannot be asked now is assumed to have the model, unless it is a hub that does not answer at all.
    Raises: CheckpointError, NotFound or StoreRefused for what is missing or incomplete; JobError; StoreError.
    """
    size = 0 if model.pipeline else _size_of(model)
    uris = [("LoRA", lora.uri) for lora in model.loras] + [("ControlNet", net.uri) for net in model.controlnets]
    for title, adapter in (("redux", model.redux), ("ip_adapter", model.ip_adapter)):
        for uri in adapter.uris if adapter else ():
            uris += [(title, uri), ("image_encoder", (adapter and adapter.image_encoder) or uri)]
    for title, uri in uris:
        if source_kind(uri) in ("local", "file") and not local_path(uri).exists():
            raise CheckpointError(f"{title} {uri} is not there")
    if no_gpu and size > MAX_BYTES_ON_CPU:
        raise JobError(
            f"workers.num_gpus: {no_gpu}, and the weights of {model.uri} have {size / 1e9:.0f} GB, which would take "
            "hours on a CPU; run the job where there is one, or set workers.num_gpus to 0 to use the CPU all the same"
        )


def _size_of(model: ModelConfig) -> int:
    """Return the bytes of a model's weights; 0 if its remote cannot be asked now. Raises: as check_weights."""
    try:
        source = find_local_model(model.uri, model.storage_options)
        if source is None and source_kind(model.uri) not in ("local", "file"):
            listing = model_listing(model.uri, model.storage_options)
            return sum(file.size or 0 for file in listing.files)
        source = source or local_model(model.uri)
        with checkpoint_errors():
            return sum(file.stat().st_size for part in find_parts(source) for file in model_files(part))
    except (NotFound, StoreRefused):
        raise
    except StoreError as error:
        reason = error.__cause__ or error
        if is_silent_hub(model.uri, error):
            raise StoreError(
                f"model.uri = {model.uri} is not on this machine, and its hub does not answer: {one_line(reason)}; run "
                "the same command again when it does, or name a folder or a bucket that has the model"
            ) from error
        log.debug("%s: cannot be read: %s", model.uri, error)
        return 0
