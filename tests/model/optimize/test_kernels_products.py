"""Products in float32 on a CPU: who asks oneDNN, and that its velocities are those of MKL, plain and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from flux_batch.model.layers import Linear, Product, product, project
from flux_batch.model.optimize import cpu_info
from flux_batch.model.optimize.compile import compile_blocks
from flux_batch.model.optimize.cpu_products import choose_products, product_by_onednn
from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Flux
from helpers.golden import FLUX, filled, tensor

needs_both = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch is built without MKL")


@pytest.fixture
def amd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CPU on which oneDNN is asked, whatever this machine has; the file in which it says who made it."""
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n")
    monkeypatch.setattr(cpu_info, "CPU_INFO", info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    return info


def products(model: Flux) -> set[Product]:
    """Return what multiplies with the matrices of the blocks."""
    return {each.product for each in model.modules() if isinstance(each, Linear)}


def velocity(model: Flux) -> torch.Tensor:
    inputs = tensor("in.img", (2, 24, 64)), tensor("in.txt", (2, 7, 24))
    pe = model.position_table(position_ids(7, 8, 12))
    with torch.inference_mode():
        return model(*inputs, pe, torch.ones(2), tensor("in.vec", (2, 32)), torch.full((2,), 3.5))


@needs_both
def test_a_cpu_with_avx512_that_intel_did_not_make_asks_onednn(amd: Path) -> None:
    model = filled(Flux(FLUX))
    choose_products(model)
    assert products(model) == {product_by_onednn}


@pytest.mark.parametrize("info", ["vendor_id\t: GenuineIntel\n", "Processor\t: ARMv8\n", None])
def test_others_ask_as_torch_does(amd: Path, info: str | None) -> None:
    amd.unlink() if info is None else amd.write_text(info)
    model = filled(Flux(FLUX))
    choose_products(model)
    assert products(model) == {product}


def test_nor_is_it_asked_without_avx512_or_in_bfloat16(amd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, model = filled(Flux(FLUX)).bfloat16(), filled(Flux(FLUX))
    choose_products(narrow)
    assert products(narrow) == {product}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    choose_products(model)
    assert products(model) == {product}


@pytest.mark.parametrize(("dtype", "num_rows"), [(torch.float32, [3, 8, 8, 3]), (torch.bfloat16, [8, 8, 8, 8])])
def test_unread_tokens_are_left_out_of_products_where_that_rounds_nothing_otherwise(
    dtype: torch.dtype, num_rows: list[int]
) -> None:
    linear, asked = Linear(4, 8).to(dtype), []

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        asked.append(x.shape[1])
        return product(x, weight, bias)

    x = torch.arange(32, dtype=dtype).view(1, 8, 4)
    whole = linear(x).split(2, dim=-1)
    linear.product = noted
    with torch.inference_mode():
        parts = project(linear, x, (2, 2, 2, 2), (3, 8, 8, 3))
    assert asked == num_rows
    for part, all_rows, length in zip(parts, whole, (3, 8, 8, 3), strict=True):
        torch.testing.assert_close(part, all_rows[:, -length:])


@needs_both
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_velocities_are_those_of_torchs_own_products(amd: Path, compiled: bool) -> None:
    torch._dynamo.reset()
    plain, model = filled(Flux(FLUX)), filled(Flux(FLUX))
    choose_products(model)
    if compiled:
        compile_blocks(model)
    before = counters["stats"]["unique_graphs"]
    torch.testing.assert_close(velocity(model), velocity(plain), rtol=0, atol=2e-5)
    assert counters["stats"]["unique_graphs"] - before == (3 if compiled else 0)
    torch._dynamo.reset()
