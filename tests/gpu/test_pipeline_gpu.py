"""The pipeline on a CUDA device, compared with the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_batch import FluxImagePipeline
from flux_batch.errors import OutOfMemory
from flux_batch.model.optimize.attention import choose_attention
from flux_batch.model.sampling import denoise
from helpers.tiny_flux import TinyFlux, make_tiny_repository

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPTS = ["a cat", "A dog, 2 birds", "x"]
SEEDS = [1, 2, 3]
SMALL = {"height": 64, "width": 96, "num_inference_steps": 3, "t5_sequence_length": 64}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TinyFlux(axes_dim=(16, 24, 24))
    return make_tiny_repository(tmp_path_factory.mktemp("models") / "tiny", config)


@pytest.fixture(scope="module")
def expected(repository: Path) -> torch.Tensor:
    """Latents in float32 on the CPU."""
    pipe = FluxImagePipeline.from_pretrained(repository, torch.float32, "cpu")
    return pipe(PROMPTS, seed=SEEDS, output_type="latent", **SMALL)


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def test_float32_gives_the_latents_and_images_of_the_cpu(repository: Path, expected: torch.Tensor) -> None:
    pipe = FluxImagePipeline.from_pretrained(repository, torch.float32, "cuda", compile=False)
    latents = pipe(PROMPTS, seed=SEEDS, output_type="latent", **SMALL)
    assert latents.is_cuda
    torch.testing.assert_close(latents.cpu(), expected, atol=1e-3, rtol=0)
    on_cpu = FluxImagePipeline.from_pretrained(repository, torch.float32, "cpu")
    images = [one(PROMPTS, seed=SEEDS, output_type="np", **SMALL) for one in (pipe, on_cpu)]
    assert np.abs(np.stack(images[0]).astype(int) - np.stack(images[1]).astype(int)).max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_near_that_of_the_cpu(repository: Path, dtype: torch.dtype) -> None:
    # Compared with the CPU in the same dtype: in bfloat16 a model this small is 0.030 from float32, on a CPU as well.
    found, expected = (
        FluxImagePipeline.from_pretrained(repository, dtype, device, compile=False)(
            PROMPTS, seed=SEEDS, output_type="latent", cfg_scale=[1.0, 1.0, 1.0], **SMALL
        ).float()
        for device in ("cuda", "cpu")
    )
    assert found.isfinite().all()
    assert (found.cpu() - expected).norm() / expected.norm() < 0.01


def test_the_same_call_is_bit_for_bit_the_same(repository: Path) -> None:
    pipe = FluxImagePipeline.from_pretrained(repository, torch.bfloat16, "cuda", compile=False)
    options = {"seed": 5, "cfg_scale": 2.0, "negative_prompt": "bad", "output_type": "latent"}
    assert torch.equal(pipe("x", **options, **SMALL), pipe("x", **options, **SMALL))


def test_the_autoencoder_is_laid_out_for_its_convolutions(repository: Path) -> None:
    pipe = FluxImagePipeline.from_pretrained(repository, torch.bfloat16, "cuda", compile=False)
    convolutions = [layer for layer in pipe.autoencoder.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in convolutions)


def test_a_image_does_not_depend_on_its_neighbours(repository: Path) -> None:
    pipe = FluxImagePipeline.from_pretrained(repository, torch.float32, "cuda", compile=False)
    together = pipe(PROMPTS, seed=SEEDS, cfg_scale=[1.0, 2.0, 1.0], output_type="np", **SMALL)
    for prompt, seed, scale, image in zip(PROMPTS, SEEDS, [1.0, 2.0, 1.0], together, strict=True):
        alone = pipe(prompt, seed=seed, cfg_scale=scale, output_type="np", **SMALL)
        assert np.abs(image.astype(int) - alone.astype(int)).max() <= 1


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_the_host_never_waits_for_the_device_within_the_loop(
    repository: Path, monkeypatch: pytest.MonkeyPatch, quantization: Any, cuda_graphs: bool
) -> None:
    how = {"compile": False, "quantization": quantization, "cuda_graphs": cuda_graphs}
    pipe = FluxImagePipeline.from_pretrained(repository, torch.bfloat16, "cuda", **how)
    options = {"seed": [1, 2], "cfg_scale": [1.0, 2.0], "negative_prompt": "bad", "output_type": "latent", **SMALL}
    expected = pipe(["x", "y"], **options)  # the first call initializes libraries
    loops = []

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        loops.append(len(args))
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return denoise(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    monkeypatch.setattr("flux_batch.pipeline.denoising.denoise", watched)
    assert torch.equal(pipe(["x", "y"], **options), expected)
    assert loops


@pytest.mark.parametrize("how", [{}, {"quantization": "fp8"}, {"compile": True}], ids=["plain", "fp8", "compiled"])
def test_cuda_graphs_change_no_bit(repository: Path, how: dict[str, Any]) -> None:
    how = {"compile": False, **how}
    plain = FluxImagePipeline.from_pretrained(repository, torch.bfloat16, "cuda", **how)
    graphs = FluxImagePipeline.from_pretrained(repository, torch.bfloat16, "cuda", cuda_graphs=True, **how)
    options = {"output_type": "latent", "num_inference_steps": 3, "t5_sequence_length": 64}
    for height, width in [(64, 96), (96, 64), (64, 64), (64, 96)]:
        for prompts in (PROMPTS, PROMPTS[:1]):
            size = {"height": height, "width": width, "seed": SEEDS[: len(prompts)]}
            for cfg in ({}, {"cfg_scale": 2.0, "negative_prompt": "bad"}):
                expected = plain(prompts, **size, **cfg, **options)
                assert torch.equal(graphs(prompts, **size, **cfg, **options), expected)


def test_compiling_is_the_default_and_rounds_alone(repository: Path) -> None:
    plain, compiled = (
        FluxImagePipeline.from_pretrained(repository, torch.float32, "cuda", compile=each) for each in (False, None)
    )
    assert plain.transformer.double_blocks[0]._compiled_call_impl is None
    assert compiled.transformer.double_blocks[0]._compiled_call_impl is not None
    images = [np.stack(pipe(PROMPTS, seed=SEEDS, output_type="np", **SMALL)).astype(int) for pipe in (plain, compiled)]
    assert np.abs(images[0] - images[1]).max() <= 1


def test_a_compiled_image_does_not_depend_on_the_sizes_before_it(repository: Path) -> None:
    options = {"seed": 1, "output_type": "latent", "num_inference_steps": 3, "t5_sequence_length": 64}
    images = []
    for sizes in ([(64, 96)], [(96, 96), (64, 64), (64, 96)]):  # compiled for this size alone, and for any size
        torch._dynamo.reset()
        pipe = FluxImagePipeline.from_pretrained(repository, torch.bfloat16, "cuda", compile=True)
        images.append([pipe("x", height=height, width=width, **options) for height, width in sizes][-1])
    assert torch.equal(*images)


@pytest.mark.parametrize("tokens", [512 + 72 * 56, 512 + 52 * 76, 200])
def test_the_chosen_attention_is_right_at_lengths_that_are_no_multiples_of_128(tokens: int) -> None:
    q, k, v = torch.randn(3, 1, 4, tokens, 128, device="cuda").bfloat16()
    with choose_attention(torch.device("cuda")).first():
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found, expected, rtol=0, atol=2**-6)


def test_offloaded_text_encoders_give_the_same_images_and_visit_the_device_to_encode(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"seed": SEEDS, "output_type": "latent", **SMALL}
    expected = FluxImagePipeline.from_pretrained(repository, torch.bfloat16, "cuda", compile=False)(PROMPTS, **options)
    pipe = FluxImagePipeline.from_pretrained(
        repository, torch.bfloat16, "cuda", compile=False, offload_text_encoders=True
    )
    weights = [weight for model in (pipe.clip.model, pipe.t5.model) for weight in model.parameters()]
    assert all(not weight.is_cuda and weight.is_pinned() for weight in weights)
    visits = []
    states = pipe.t5.states
    monkeypatch.setattr(
        pipe.t5, "states", lambda ids: visits.append(pipe.t5.model.shared.weight.device.type) or states(ids)
    )
    prompt_embeds, pooled_prompt_embeds = pipe.encode_prompt(PROMPTS, 64)
    assert not prompt_embeds.is_cuda
    assert not pooled_prompt_embeds.is_cuda
    assert visits == ["cuda"] * len(PROMPTS)
    embeds = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
    assert torch.equal(pipe(**embeds, **options), expected)
    assert torch.equal(pipe(PROMPTS, **options), expected)
    assert visits == ["cuda"] * len(PROMPTS)
    assert not any(weight.is_cuda for weight in pipe.t5.model.parameters())


def test_running_out_of_memory_is_told_and_survived(repository: Path) -> None:
    pipe = FluxImagePipeline.from_pretrained(repository, torch.bfloat16, "cuda", compile=False)
    pipe("x", seed=1, **SMALL)
    torch.cuda.empty_cache()
    # At most 0.25 GB on the largest devices; these images need more.
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        with pytest.raises(OutOfMemory):
            pipe(["x"] * 8, height=4096, width=4096, num_inference_steps=1, t5_sequence_length=64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
    pipe("x", seed=1, **SMALL)
