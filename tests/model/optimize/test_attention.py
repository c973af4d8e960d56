"""The choice of attention kernels by GPU and version, and only among those that work."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from flux_batch.model.optimize import attention
from flux_batch.model.optimize.attention import TORCH_ATTENTION, AttentionKernels, attention_works, choose_attention

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
REST = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
CUDNN = AttentionKernels("cudnn", (SDPBackend.CUDNN_ATTENTION, *REST))
FLASH_3 = AttentionKernels("flash3", REST)


@dataclass
class Gpu:
    """A simulated GPU with its installed libraries."""

    capability: tuple[int, int] = (9, 0)
    cudnn: int | None = 92000
    has_flash_3: bool = False
    works: frozenset[SDPBackend] = frozenset(SDPBackend.__members__.values())
    active: str | None = None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()

    def activate(name: str) -> None:
        gpu.active = name

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu.capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: gpu.cudnn)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: gpu.has_flash_3 or None)
    monkeypatch.setattr(attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: gpu.active)
    monkeypatch.setattr(attention, "restore_flash_attention_impl", lambda: activate("none"))
    monkeypatch.setattr(attention, "attention_works", lambda backend, device: backend in gpu.works)
    return gpu


def test_a_cpu_has_nothing_to_choose() -> None:
    assert choose_attention(CPU) == TORCH_ATTENTION


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (10, 7), (12, 0)])
def test_other_gpus_than_hoppers_keep_the_order_of_torch_whatever_is_installed(
    gpu: Gpu, capability: tuple[int, int]
) -> None:
    gpu.capability, gpu.has_flash_3 = capability, True
    assert choose_attention(CUDA) == TORCH_ATTENTION
    assert gpu.active is None


def test_a_gpu_of_amd_that_says_9_is_no_hopper(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose_attention(CUDA) == TORCH_ATTENTION


def test_hopper_asks_flash_attention_3_if_it_is_installed_and_works(gpu: Gpu) -> None:
    gpu.has_flash_3 = True
    assert [choose_attention(CUDA), choose_attention(CUDA)] == [FLASH_3, FLASH_3]
    assert gpu.active == "FA3"


def test_a_flash_attention_3_that_does_not_work_is_given_up_for_the_next_kernel(gpu: Gpu) -> None:
    gpu.has_flash_3, gpu.works = True, frozenset({SDPBackend.CUDNN_ATTENTION})
    assert choose_attention(CUDA) == CUDNN
    assert gpu.active == "none"


def test_one_that_cannot_be_imported_is_named_and_the_next_kernel_taken(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> None:
        raise ImportError("undefined symbol")

    gpu.has_flash_3 = True
    monkeypatch.setattr(attention, "activate_flash_attention_impl", fail)
    with caplog.at_level(logging.WARNING):
        assert choose_attention(CUDA) == CUDNN
    assert "flash_attn_interface cannot be used, the next kernel is taken: undefined symbol" in caplog.text


@pytest.mark.parametrize(("version", "works"), [(91500, True), (90100, True), (None, True), (92000, False)])
def test_an_early_cudnn_or_one_that_does_not_work_leaves_the_order_of_torch(
    gpu: Gpu, version: int | None, works: bool
) -> None:
    gpu.cudnn = version
    gpu.works = gpu.works if works else frozenset()
    assert choose_attention(CUDA) == TORCH_ATTENTION


def test_hopper_asks_cudnn_of_a_version_that_torch_trusts(gpu: Gpu) -> None:
    gpu.cudnn = 91501
    assert choose_attention(CUDA) == CUDNN


@pytest.mark.parametrize(("added", "works"), [(0.0, True), (0.1, False), (float("nan"), False)])
def test_a_kernel_with_wrong_numbers_does_not_work(
    added: float, works: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[SDPBackend] = []
    exact = torch.nn.functional.scaled_dot_product_attention

    @contextmanager
    def noted(backend: SDPBackend) -> Iterator[None]:
        asked.append(backend)
        yield

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        return exact(*qkv) + (added if asked[-1] is SDPBackend.CUDNN_ATTENTION else 0.0)

    monkeypatch.setattr(attention, "sdpa_kernel", noted)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    with caplog.at_level(logging.WARNING):
        assert attention_works(SDPBackend.CUDNN_ATTENTION, CPU) is works
    assert asked == 2 * [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]  # once for all tokens, and once for the image's
    assert ("attention by CUDNN_ATTENTION does not work here" in caplog.text) is not works


def test_a_kernel_that_is_not_there_does_not_work() -> None:
    assert attention_works(SDPBackend.MATH, CPU)
    assert not attention_works(SDPBackend.CUDNN_ATTENTION, CPU)


def test_the_order_is_set_within_the_context() -> None:
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with CUDNN.first():
        assert tuple(_cur_sdpa_kernel_backends(with_priority=True)) == CUDNN.order
    with TORCH_ATTENTION.first():
        assert _cur_sdpa_kernel_backends(with_priority=True) == before
