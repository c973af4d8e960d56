"""Weights that visit a device: there within, at home and the same bits before and after. The device is meta."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from flux_batch.model.optimize.offload import Visitors

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


def test_weights_are_on_the_device_within_a_visit_alone(module: nn.Module) -> None:
    before = [tensor.clone() for tensor in tensors(module)]
    visitors = Visitors([module], META)
    for _ in range(2):
        assert devices(module) == {"cpu"}
        with torch.inference_mode(), visitors.visit():
            assert devices(module) == {"meta"}
    assert all(torch.equal(*pair) for pair in zip(tensors(module), before, strict=True))
    assert not any(tensor.is_inference() for tensor in tensors(module))


def test_a_visit_that_fails_ends_at_home(module: nn.Module) -> None:
    visitors = Visitors([module], META)
    with pytest.raises(RuntimeError, match="broken"), visitors.visit():
        raise RuntimeError("broken")
    assert devices(module) == {"cpu"}


def test_what_changes_where_it_may_stays_changed(module: nn.Module) -> None:
    visitors = Visitors([module], CPU)
    with visitors.visit(may_change=True):
        module[0].weight.data = torch.full((4, 3), 2.0)
    assert (module[0].weight == 2).all()
    with visitors.visit():
        module[0].weight.data = torch.full((4, 3), 3.0)
    assert (module[0].weight == 2).all()
