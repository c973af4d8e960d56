"""fp8, the step cache and the memory figures of a plan on a CUDA device, compared with the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flux_batch import FluxImagePipeline
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.footprint import decode_bytes, denoise_bytes, weight_bytes
from flux_batch.model.optimize.quantize import apply_fp8, fp8_matmul, fp8_matmul_obstacle, to_fp8
from flux_batch.model.params import AUTOENCODER, DEV
from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Flux
from helpers.tiny_flux import TinyFlux, make_tiny_repository

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")
PRODUCTS = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(fp8_matmul_obstacle(CUDA)), reason="no products in fp8 on this device"
)
PROMPTS, SEEDS = ["a cat", "A dog, 2 birds", "x"], [1, 2, 3]
SMALL: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 4, "t5_sequence_length": 64}
# A sixth of FLUX.1-dev's width and few of its blocks: large enough for activations to dominate the memory.
MEDIUM = replace(
    DEV,
    hidden_size=512,
    mlp_hidden_dim=2048,
    num_heads=4,
    depth=3,
    depth_single_blocks=4,
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TinyFlux(axes_dim=(16, 24, 24))
    return make_tiny_repository(tmp_path_factory.mktemp("models") / "tiny", config)


def latents(repository: Path, device: str, quantization: Any = "none", **options: Any) -> torch.Tensor:
    pipe = FluxImagePipeline.from_pretrained(
        repository, torch.bfloat16, device, compile=False, quantization=quantization
    )
    result: torch.Tensor = pipe(PROMPTS, seed=SEEDS, output_type="latent", **SMALL, **options)
    return result.float().cpu()


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def test_rows_become_the_same_fp8_as_on_the_cpu() -> None:
    rows = torch.randn(300, 1024, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 300)[:, None]
    rows[7] = 0
    for dtype in (torch.float32, torch.bfloat16):
        (weight, scale), (ours, its_scale) = to_fp8(rows.to(dtype)), to_fp8(rows.to(CUDA, dtype))
        torch.testing.assert_close(its_scale.cpu(), scale, rtol=1e-6, atol=0)
        # A quotient may be rounded differently, by one step of fp8.
        assert (ours.cpu().view(torch.uint8) == weight.view(torch.uint8)).float().mean() > 0.999


@PRODUCTS
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 16, 16), (7, 3072, 9216), (300, 15360, 3072)])
def test_a_product_is_that_of_the_stand_in(rows: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(1)
    (a, a_scale), (b, b_scale) = (to_fp8(torch.randn(n, inputs, generator=generator)) for n in (rows, outputs))
    expected = fp8_matmul(a, a_scale, b, b_scale)
    result = fp8_matmul(a.to(CUDA), a_scale.to(CUDA), b.to(CUDA), b_scale.to(CUDA))
    assert result.dtype == torch.bfloat16
    assert error(result.float().cpu(), expected.float()) < 4e-3


@pytest.mark.parametrize("quantization", ["fp8", pytest.param("fp8_matmul", marks=PRODUCTS)])
def test_fp8_is_near_what_it_is_on_the_cpu(repository: Path, quantization: str) -> None:
    result = latents(repository, "cuda", quantization)
    assert result.isfinite().all()
    assert error(result, latents(repository, "cpu", quantization)) < 0.05
    assert 0 < error(result, latents(repository, "cuda")) < 0.1


@pytest.mark.parametrize("quantization", ["fp8", pytest.param("fp8_matmul", marks=PRODUCTS)])
def test_the_same_call_is_bit_for_bit_the_same(repository: Path, quantization: str) -> None:
    assert torch.equal(latents(repository, "cuda", quantization), latents(repository, "cuda", quantization))


def test_the_step_cache_reuses_and_stays_near(repository: Path) -> None:
    exact, reused = latents(repository, "cuda"), latents(repository, "cuda", step_cache=0.2)
    assert reused.isfinite().all()
    assert error(reused, exact) < 0.3
    assert torch.equal(latents(repository, "cuda", step_cache=0.0), exact)


def peak_of(call: Any) -> int:
    """Return the peak memory of a call above the memory before it, in bytes."""
    call()  # the first call allocates the workspace of libraries
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("quantization", ["none", "fp8", pytest.param("fp8_matmul", marks=PRODUCTS)])
def test_denoising_takes_the_memory_that_a_plan_says(quantization: str) -> None:
    with CUDA:
        model = Flux(MEDIUM).bfloat16().requires_grad_(False)
    shapes = shapes_of(model)
    if quantization != "none":
        apply_fp8(model, matmul=quantization == "fp8_matmul")
    held = sum(value.nbytes for value in [*model.parameters(), *model.buffers()])
    assert held == weight_bytes("transformer", shapes, "bfloat16", quantization)
    ids = position_ids(512, 128, 128).to(CUDA)
    kind = {"dtype": torch.bfloat16, "device": CUDA}
    inputs = (
        torch.randn(2, 4096, 64, **kind),
        torch.randn(2, 512, 4096, **kind),
        model.position_table(ids),
        torch.rand(2, **kind),
        torch.randn(2, 768, **kind),
        torch.rand(2, **kind),
    )
    with torch.inference_mode():
        peak = peak_of(lambda: model(*inputs))
    counted = denoise_bytes(shapes, 4096 + 512, 2, "bfloat16", quantization)
    assert peak == pytest.approx(counted, rel=0.15)


def test_decoding_takes_the_memory_that_a_plan_says() -> None:
    with CUDA:
        model = AutoEncoder(AUTOENCODER).bfloat16().requires_grad_(False)
    z = torch.randn(1, 16, 128, 128, dtype=torch.bfloat16, device=CUDA)
    with torch.inference_mode():
        peak = peak_of(lambda: model.decode(z))
    # The peak also includes workspaces of convolutions and attention, which depend on the device.
    counted = decode_bytes(shapes_of(model), 1024, 1024, 1, "bfloat16")
    assert 0.9 * counted < peak < 1.5 * counted
