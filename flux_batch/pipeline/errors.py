"""The translation of errors of the model and its device into errors of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from flux_batch.errors import CheckpointError, DeviceFatal, FluxBatchError, OutOfMemory

# Parts of torch's messages, for errors without a class of their own.
_OUT_OF_MEMORY_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "STATUS_ALLOC_FAILED",  # of cuBLAS and cuDNN
    "DEVICE_ALLOCATION_FAILED",  # of cuDNN 9
)
# A kernel's error is reported by the next call of the device, in compiled code by the launcher of Triton or torch.
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
    """Run the block and raise CheckpointError in place of errors of reading weights."""
    try:
        yield
    except FluxBatchError:
        raise
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(str(error)) from error


@contextmanager
def device_errors() -> Iterator[None]:
    """Run the block and translate device errors into OutOfMemory or DeviceFatal.

    OutOfMemory affects only the batch, DeviceFatal the whole process.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(str(error)) from error
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        message = str(error)
        if any(sign in message for sign in _OUT_OF_MEMORY_SIGNS):
            # A driver or library needs memory: torch frees its cached blocks by itself only for its own tensors.
            with suppress(RuntimeError):  # a device that has failed is reported by its next call
                torch.cuda.empty_cache()
            raise OutOfMemory(message) from error
        has_failed = isinstance(error, (torch.AcceleratorError, torch.cuda.DeferredCudaCallError))
        if has_failed or any(sign in message for sign in _DEVICE_FATAL_SIGNS):
            raise DeviceFatal(message) from error
        raise
