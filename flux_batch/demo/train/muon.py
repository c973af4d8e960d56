"""An optimizer for small machines: Muon for matrices, AdamW for the rest.

Source of the method and its five coefficients: KellerJordan/Muon, muon.py. torch.optim.Muon supports no convolutions
and always works in bfloat16, which is slow on CPUs without instructions for it. In this training Muon needs a third of
the steps of AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_NUM_ITERATIONS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315
# Matrices on pixels, words or time train better with AdamW, and so do those narrower than this.
MIN_SIDE = 16


class Muon(torch.optim.Optimizer):
    """Muon: steps along the orthogonal matrix nearest to the averaged gradient; convolutions count as matrices.

    matmul_dtype: the dtype of the products that compute that matrix.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        matmul_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(list(params), {"lr": lr, "weight_decay": weight_decay})
        self.matmul_dtype = matmul_dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters once."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                state["average"].lerp_(parameter.grad, 1 - _MOMENTUM)
                direction = parameter.grad.lerp(state["average"], _MOMENTUM).flatten(1)
                stretch = max(1.0, direction.shape[0] / direction.shape[1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                step = orthogonal(direction.to(self.matmul_dtype)).to(parameter.dtype).reshape(parameter.shape)
                parameter.add_(step, alpha=-group["lr"] * stretch)


class Optimizer:
    """Two optimizers in one: Muon for the inner matrices of a model, AdamW for the rest."""

    def __init__(
        self,
        model: nn.Module,
        matrices: list[nn.Parameter],
        matrix_rate: float,
        rate: float,
        matmul_dtype: torch.dtype = torch.float32,
    ) -> None:
        chosen = {id(parameter) for parameter in matrices}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
        self.model = model
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.01), rate)
        ]
        if matrices:
            self.parts.append((Muon(matrices, matrix_rate, weight_decay=0.01, matmul_dtype=matmul_dtype), matrix_rate))

    def update(self, loss: Tensor, share: float) -> None:
        """Update all parameters once by the gradient of `loss`, at a share of full rates."""
        for part, rate in self.parts:
            part.zero_grad(set_to_none=True)
            for group in part.param_groups:
                group["lr"] = rate * share
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
        for part, _ in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimizers."""
        return {"parts": [part.state_dict() for part, _ in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of both optimizers."""
        for (part, _), saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return an approximation of the closest orthogonal matrix, by Newton-Schulz iteration: (m, n) -> (m, n)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_NUM_ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x
