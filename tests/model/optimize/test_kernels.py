"""The kernels of each device: their choice, and velocities equal to those of torch's kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flux_batch.model.layers import BlockLinear, Matmul, project
from flux_batch.model.optimize.compile import use_compilable_functions
from flux_batch.model.optimize.kernels import (
    apply_cpu_kernels,
    onednn_matmul,
    opaque_onednn_matmul,
    project_apart,
)
from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Flux
from helpers.golden import FLUX, filled, tensor

needs_both = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch is built without MKL")


def matmuls(model: Flux) -> set[Matmul]:
    """Return the functions that multiply by the matrices of the blocks."""
    return {each.matmul for each in model.modules() if isinstance(each, BlockLinear)}


def velocity(model: Flux) -> torch.Tensor:
    inputs = tensor("in.img", (2, 24, 64)), tensor("in.txt", (2, 7, 24))
    pe = model.position_table(position_ids(7, 8, 12))
    with torch.inference_mode():
        return model(*inputs, pe, torch.ones(2), tensor("in.vec", (2, 32)), torch.full((2,), 3.5))


@needs_both
def test_a_cpu_with_avx512_that_intel_did_not_make_asks_onednn(amd: Path) -> None:
    model = filled(Flux(FLUX))
    apply_cpu_kernels(model)
    assert matmuls(model) == {onednn_matmul}


@needs_both
def test_compiled_blocks_keep_what_their_code_calls(amd: Path) -> None:
    """A second pipeline of the same model finds the kernels compiled."""
    model = filled(Flux(FLUX))
    apply_cpu_kernels(model)
    use_compilable_functions(model, torch.device("cpu"))
    assert matmuls(model) == {opaque_onednn_matmul}
    apply_cpu_kernels(model)
    assert matmuls(model) == {opaque_onednn_matmul}


@pytest.mark.parametrize("info", ["vendor_id\t: GenuineIntel\n", "Processor\t: ARMv8\n", None])
def test_others_ask_as_torch_does(amd: Path, info: str | None) -> None:
    amd.unlink() if info is None else amd.write_text(info)
    model = filled(Flux(FLUX))
    apply_cpu_kernels(model)
    assert matmuls(model) == {F.linear}


def test_nor_is_it_asked_without_avx512_or_in_bfloat16(amd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, model = filled(Flux(FLUX)).bfloat16(), filled(Flux(FLUX))
    apply_cpu_kernels(narrow)
    assert matmuls(narrow) == {F.linear}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    apply_cpu_kernels(model)
    assert matmuls(model) == {F.linear}


@pytest.mark.parametrize(("dtype", "num_rows"), [(torch.float32, [3, 8, 8, 3]), (torch.bfloat16, [8, 8, 8, 8])])
def test_unread_tokens_are_left_out_of_products_where_that_rounds_nothing_differently(
    dtype: torch.dtype, num_rows: list[int]
) -> None:
    linear, asked = BlockLinear(4, 8).to(dtype), []

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        asked.append(x.shape[1])
        return F.linear(x, weight, bias)

    x = torch.arange(32, dtype=dtype).view(1, 8, 4)
    expected = project(linear, x, (2, 2, 2, 2), (3, 8, 8, 3))
    linear.matmul = noted
    with torch.inference_mode():
        parts = project_apart(linear, x, (2, 2, 2, 2), (3, 8, 8, 3))
    assert asked == num_rows
    for part, other in zip(parts, expected, strict=True):
        torch.testing.assert_close(part, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_a_cpu_projects_apart_and_modulates_one_step_at_a_time(dtype: torch.dtype) -> None:
    plain, model = filled(Flux(FLUX)).to(dtype), filled(Flux(FLUX)).to(dtype)
    apply_cpu_kernels(model)
    assert all(block.project is project_apart for block in model.single_blocks)
    assert all(block.img_attn.project is block.txt_attn.project is project_apart for block in model.double_blocks)
    assert model.modulation_rows == 1
    if dtype == torch.float32:
        torch.testing.assert_close(velocity(model), velocity(plain), rtol=0, atol=2e-5)


def test_a_model_on_another_device_is_left_as_it_is() -> None:
    with torch.device("meta"):
        model = Flux(FLUX)
    apply_cpu_kernels(model)
    assert all(block.project is project for block in model.single_blocks)
    assert matmuls(model) == {F.linear}
    assert model.modulation_rows == 64


@needs_both
def test_velocities_are_those_of_torchs_own_products(amd: Path) -> None:
    plain, model = filled(Flux(FLUX)), filled(Flux(FLUX))
    apply_cpu_kernels(model)
    torch.testing.assert_close(velocity(model), velocity(plain), rtol=0, atol=2e-5)
