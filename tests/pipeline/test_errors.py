"""Errors of a device and of libraries become ours, by what to do about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flux_batch import FluxImagePipeline
from flux_batch.errors import DeviceFatal, OutOfMemory
from flux_batch.pipeline import compiled
from flux_batch.pipeline.errors import device_errors


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OutOfMemory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), OutOfMemory),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), OutOfMemory),
        (RuntimeError("Triton Error [CUDA]: out of memory"), OutOfMemory),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceFatal),
        (RuntimeError("CUDA driver error: an illegal memory access was encountered"), DeviceFatal),
        (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), DeviceFatal),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), DeviceFatal),
        (torch.cuda.DeferredCudaCallError("CUDA call failed lazily at initialization"), DeviceFatal),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
    ],
)
def test_what_a_device_raises_becomes_ours(error: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected) as caught, device_errors():
        raise error
    assert type(caught.value) is expected


def test_a_device_that_fails_while_a_model_is_opened_is_fatal(
    monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    def fail(*given: Any) -> None:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(compiled, "choose_attention", fail)
    with pytest.raises(DeviceFatal, match="ECC error"):
        FluxImagePipeline.from_pretrained(repository, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    with pytest.raises(DeviceFatal, match="ECC error"):
        FluxImagePipeline.from_pretrained(repository, device="cuda")


def test_memory_that_a_library_lacks_is_given_back_for_the_next_try(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[None] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error [CUDA]: out of memory")):
        with pytest.raises(OutOfMemory), device_errors():
            raise error
    assert len(emptied) == 1

    def fail() -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    with pytest.raises(OutOfMemory, match="out of memory"), device_errors():
        raise RuntimeError("CUDA error: out of memory")
