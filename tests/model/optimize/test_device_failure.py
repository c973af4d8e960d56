"""Trials on a device that fails while it is tried: no answer to the trial, and no reason to go on without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from flux_batch.model.optimize import attention, quantize
from flux_batch.model.optimize import compile as optimize_compile
from flux_batch.model.optimize.attention import attention_works
from flux_batch.model.optimize.compile import apply_compile
from flux_batch.model.optimize.device_failure import raise_device_failure
from flux_batch.model.optimize.quantize import fp8_product_error
from flux_batch.model.transformer import Flux
from helpers.golden import FLUX, filled

CPU = torch.device("cpu")
ECC = "CUDA error: uncorrectable ECC error encountered"


def fail(*given: Any, **others: Any) -> Any:
    raise torch.AcceleratorError(ECC)


@pytest.mark.parametrize("trial", ["attention", "product", "compile"])
def test_a_device_that_fails_in_a_trial_is_told(monkeypatch: pytest.MonkeyPatch, trial: str) -> None:
    tried: list[torch.device] = []

    def raise_it(error: Exception, device: torch.device) -> None:
        tried.append(device)
        raise error

    for module in (attention, quantize, optimize_compile):
        monkeypatch.setattr(module, "raise_device_failure", raise_it)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fail)
    monkeypatch.setattr(quantize, "fp8_matmul", fail)
    monkeypatch.setattr(torch, "compile", lambda function: fail)
    trials = {
        "attention": lambda: attention_works(SDPBackend.CUDNN_ATTENTION, CPU),
        "product": lambda: fp8_product_error(CPU),
        "compile": lambda: apply_compile(filled(Flux(FLUX))),
    }
    with pytest.raises(torch.AcceleratorError, match=ECC):
        trials[trial]()
    assert tried == [CPU]


def test_an_error_is_raised_if_the_device_repeats_it_or_there_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    raise_device_failure(error, torch.device("cuda"))
    raise_device_failure(RuntimeError("no execution plans"), CPU)
    with pytest.raises(torch.OutOfMemoryError):
        raise_device_failure(torch.OutOfMemoryError("CUDA out of memory"), CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(torch.AcceleratorError, match=ECC):
        raise_device_failure(error, torch.device("cuda", 1))


def test_a_product_that_torch_refuses_by_its_arguments_is_one_that_a_gpu_cannot_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*given: Any) -> Any:
        raise ValueError("Invalid scaling configuration")

    monkeypatch.setattr(quantize, "fp8_matmul", refuse)
    assert fp8_product_error(CPU) == "Invalid scaling configuration"
