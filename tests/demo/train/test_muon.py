from __future__ import annotations

import pytest
import torch
from torch import nn

from flux_batch.demo.train.muon import Muon, Optimizer, orthogonal


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)])
def test_steps_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    values = torch.linalg.svdvals(orthogonal(matrix))

    # The bounds of the method: its coefficients trade exactness for speed, and values near 0 stay small.
    assert values[: int(0.95 * len(values))].min() > 0.5
    assert values.max() < 1.3


def test_a_convolution_is_a_matrix() -> None:
    kernel = nn.Parameter(torch.zeros(16, 16, 3, 3))
    optimizer = Muon([kernel], lr=1.0)
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()

    assert torch.linalg.svdvals(kernel.detach().flatten(1)).max() < 1.3


def test_both_optimizers_go_on_where_they_stopped() -> None:
    target = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))

    def make() -> tuple[nn.Linear, Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(16, 8)
        return model, Optimizer(model, [model.weight], 0.02, 0.02)

    def train(model: nn.Linear, optimizer: Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.update((model.weight - target).square().sum() + model.bias.square().sum(), 1.0)

    whole, whole_optimizer = make()
    train(whole, whole_optimizer, 6)
    first, first_optimizer = make()
    train(first, first_optimizer, 3)
    second, second_optimizer = make()
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    train(second, second_optimizer, 3)

    assert torch.equal(whole.weight, second.weight)
    assert torch.equal(whole.bias, second.bias)
    assert (whole.weight - target).square().sum() < (make()[0].weight - target).square().sum()
