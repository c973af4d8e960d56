"""Offloaded weights are on the device (meta) inside a block, and unchanged in host memory outside of it."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Barrier, BrokenBarrierError, Thread

import pytest
import torch
from torch import Tensor, nn

from flux_batch.model.optimize.offload import apply_offload

META, CPU = torch.device("meta"), torch.device("cpu")


@pytest.fixture
def module() -> nn.Module:
    shared = nn.Linear(3, 4).requires_grad_(False)
    module = nn.Sequential(shared, nn.Sequential(shared, nn.BatchNorm1d(4).requires_grad_(False)))
    module[1].register_buffer("position_ids", torch.arange(5), persistent=False)
    return module


def tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def devices(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in tensors(module)}


def test_weights_are_on_the_device_inside_only(module: nn.Module) -> None:
    before = [tensor.clone() for tensor in tensors(module)]
    offloaded = apply_offload([module], META)
    for _ in range(2):
        assert devices(module) == {"cpu"}
        with torch.inference_mode(), offloaded.on_device():
            assert devices(module) == {"meta"}
    assert all(torch.equal(*pair) for pair in zip(tensors(module), before, strict=True))
    assert not any(tensor.is_inference() for tensor in tensors(module))


def test_weights_leave_the_device_after_a_failure(module: nn.Module) -> None:
    offloaded = apply_offload([module], META)
    with pytest.raises(RuntimeError, match="broken"), offloaded.on_device():
        raise RuntimeError("broken")
    assert devices(module) == {"cpu"}


def test_threads_take_turns_at_weights_on_the_device(module: nn.Module) -> None:
    offloaded = apply_offload([module], META)
    both = Barrier(2, timeout=0.2)
    met = []

    def use() -> None:
        with offloaded.on_device():
            try:
                both.wait()
                met.append(True)
            except BrokenBarrierError:
                pass

    threads = [Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not met
    assert devices(module) == {"cpu"}


def test_changes_are_copied_back_only_if_they_may_be(module: nn.Module) -> None:
    offloaded = apply_offload([module], CPU)
    with offloaded.on_device(may_change=True):
        module[0].weight.data = torch.full((4, 3), 2.0)
    assert (module[0].weight == 2).all()
    with offloaded.on_device():
        module[0].weight.data = torch.full((4, 3), 3.0)
    assert (module[0].weight == 2).all()
