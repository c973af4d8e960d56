"""Compiled blocks: the velocities of plain ones, one graph for all of a kind, and a clear word where it fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from flux_batch.model.optimize.compile import compile_blocks
from flux_batch.model.optimize.quantize import quantize_transformer
from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Flux
from helpers.golden import FLUX, filled, tensor

# torch's own, when its compiler is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def velocity(model: Flux, images: int = 2, rows: int = 4, cols: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs = tensor("in.img", (images, rows * cols, 64)), tensor("in.txt", (images, 7, 24))
    pe = model.position_table(position_ids(7, 2 * rows, 2 * cols))
    ones = torch.ones(images, dtype=dtype)
    with torch.inference_mode():
        return model(*(x.to(dtype) for x in inputs), pe, ones, tensor("in.vec", (images, 32)).to(dtype), 3.5 * ones)


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_a_kind_of_block_and_the_last_one_are_compiled_once_for_a_size_and_once_more_for_all_others() -> None:
    plain, model = filled(Flux(FLUX)), filled(Flux(FLUX))
    names = list(model.state_dict())
    compile_blocks(model)
    before = num_graphs()
    torch.testing.assert_close(velocity(model), velocity(plain), rtol=0, atol=2e-5)
    assert num_graphs() - before == 3
    for size in ((4, 8), (6, 4), (8, 6), (4, 6)):
        torch.testing.assert_close(velocity(model, 2, *size), velocity(plain, 2, *size), rtol=0, atol=2e-5)
    assert num_graphs() - before == 6
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("products", [False, True], ids=["bfloat16", "products in fp8"])
def test_narrow_blocks_are_as_exact_compiled(products: bool) -> None:
    plain, model = (filled(Flux(FLUX)).bfloat16().requires_grad_(False) for _ in range(2))
    if products:
        for one in (plain, model):
            quantize_transformer(one, products=True)
    compile_blocks(model)
    exact = velocity(filled(Flux(FLUX)))
    made = [velocity(one, dtype=torch.bfloat16).float() for one in (plain, model)]
    errors = [float((one - exact).norm() / exact.norm()) for one in made]
    assert errors[0] > (0.01 if products else 0.001)
    assert errors[1] == pytest.approx(errors[0], rel=0.15)
    assert not counters["graph_break"]


def test_modulation_is_not_compiled_and_keeps_its_bits() -> None:
    plain, model = (filled(Flux(FLUX)).bfloat16().requires_grad_(False) for _ in range(2))
    compile_blocks(model)
    vec = tensor("in.vec", (5, FLUX.hidden_size)).bfloat16()
    for ours, theirs in zip(model.modulations(vec).tensors(), plain.modulations(vec).tensors(), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_that_change_are_seen() -> None:
    """As those of a LoRA, which is merged in place."""
    plain, model = filled(Flux(FLUX)), filled(Flux(FLUX))
    compile_blocks(model)
    before = velocity(model)
    for one in (plain, model):
        one.single_blocks[0].linear2.weight.data.mul_(1.5)
    after = velocity(model)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, velocity(plain), rtol=0, atol=2e-5)


def test_a_machine_that_cannot_compile_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(*given: Any, **others: Any) -> Any:
        def fail(*given: Any) -> Any:
            raise RuntimeError("no C++ compiler")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(ValueError, match=r"torch\.compile does not work here: no C\+\+ compiler"):
        compile_blocks(filled(Flux(FLUX)))
