"""LoRAs on a CUDA device, where weights are changed in place and restored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flux_batch import FluxImagePipeline
from helpers.lora_files import random_factors, write_lora
from helpers.tiny_flux import TinyFlux, make_tiny_repository

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = {"transformer_blocks.0.attn.to_q": (32, 32), "single_transformer_blocks.1.proj_mlp": (128, 32)}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_repository(tmp_path_factory.mktemp("models") / "tiny", TinyFlux())


def bits(pipe: FluxImagePipeline) -> dict[str, bytes]:
    state = pipe.transformer.state_dict()
    return {
        name: value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, value in state.items()
    }


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_weights_change_in_their_places_and_come_back(tmp_path: Path, repository: Path, quantization: str) -> None:
    pipe = FluxImagePipeline.from_pretrained(repository, device="cuda", compile=False, quantization=quantization)  # type: ignore[arg-type]
    lora = write_lora(tmp_path / "x.safetensors", random_factors(SHAPES), prefix="transformer.")
    before = bits(pipe)
    places = {name: value.data_ptr() for name, value in pipe.transformer.state_dict().items()}

    pipe.set_loras([(lora, 1.0)])
    merged = bits(pipe)
    pipe.set_loras([(lora, 0.2)])
    pipe.set_loras([(lora, 1.0)])

    assert merged != before
    assert bits(pipe) == merged
    pipe.unload_loras()
    assert bits(pipe) == before
    assert {name: value.data_ptr() for name, value in pipe.transformer.state_dict().items()} == places


def test_a_merge_equals_that_on_the_cpu(tmp_path: Path, repository: Path) -> None:
    lora = write_lora(tmp_path / "x.safetensors", random_factors(SHAPES), prefix="transformer.")
    states = []
    for device in ("cpu", "cuda"):
        pipe = FluxImagePipeline.from_pretrained(repository, torch.float32, device, compile=False)
        torch.set_float32_matmul_precision("high")
        try:
            pipe.load_lora(lora, 0.5)
        finally:
            torch.set_float32_matmul_precision("highest")
        states.append(pipe.transformer.state_dict())

    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name].cpu(), rtol=1e-6, atol=1e-6), name


def test_loras_of_offloaded_text_encoders_are_those_of_others(tmp_path: Path, repository: Path) -> None:
    shapes = {"text_model.encoder.layers.0.self_attn.q_proj": (32, 32)}
    lora = write_lora(tmp_path / "x.safetensors", random_factors(shapes), prefix="text_encoder.")
    pipes = [
        FluxImagePipeline.from_pretrained(repository, device="cuda", compile=False, offload_text_encoders=offload)
        for offload in (False, True)
    ]
    plain = {name: value.cpu() for name, value in pipes[0].clip.model.state_dict().items()}
    for loras in ([(lora, 1.0)], [(lora, 0.5)], []):
        for pipe in pipes:
            pipe.set_loras(loras)
        states = [pipe.clip.model.state_dict() for pipe in pipes]
        assert all(torch.equal(value.cpu(), states[1][name]) for name, value in states[0].items())
        assert all(torch.equal(plain[name], value) for name, value in states[1].items()) == (not loras)
