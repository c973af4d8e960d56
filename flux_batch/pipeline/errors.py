"""The translation of errors of the model and its device into ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from flux_batch.errors import CheckpointError, DeviceFatal, FluxBatchError, OutOfMemory

# Parts of messages of torch, for errors that have no class of their own.
_OUT_OF_MEMORY_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "STATUS_ALLOC_FAILED",  # of cuBLAS and cuDNN
    "DEVICE_ALLOCATION_FAILED",  # of cuDNN 9
)
# An error of a kernel comes with the next call of the device, which for compiled code is Triton's or torch's launcher.
_DEVICE_FATAL_SIGNS = (
    "CUDA error",
    "CUDA driver error",
    "Triton Error [CUDA]",
    "CUBLAS_STATUS",
    "CUDNN_STATUS",
    "cuDNN error",
    "NCCL error",
)


@contextmanager
def checkpoint_errors() -> Iterator[None]:
    """Raise CheckpointError in place of the errors of reading weights."""
    try:
        yield
    except FluxBatchError:
        raise
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(str(error)) from error


@contextmanager
def device_errors() -> Iterator[None]:
    """Raise OutOfMemory (this batch) or DeviceFatal (this process) in place of a device's errors."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(str(error)) from error
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        message = str(error)
        if any(sign in message for sign in _OUT_OF_MEMORY_SIGNS):
            # A driver or library asked: torch gives back what it keeps free for its own tensors only.
            with suppress(RuntimeError):  # of a device that has failed, which the next call will tell
                torch.cuda.empty_cache()
            raise OutOfMemory(message) from error
        has_failed = isinstance(error, (torch.AcceleratorError, torch.cuda.DeferredCudaCallError))
        if has_failed or any(sign in message for sign in _DEVICE_FATAL_SIGNS):
            raise DeviceFatal(message) from error
        raise
