"""The whole pipeline as CUDA, at full size without a GPU: tensors have shapes and devices, but no data.

The model has FLUX.1-dev's widths, with two blocks of each kind instead of 19 and 38, and two layers of each text
encoder. Only tests/gpu can test the results and the speed of the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from flux_batch import FluxImagePipeline, ModelManager
from flux_batch.bench.pipeline import random_model
from flux_batch.bench.pipeline.pipeline import Call, bench_pipeline, format_pipeline
from flux_batch.bench.pipeline.random_model import random_manager
from flux_batch.bench.source import Source
from flux_batch.errors import InvalidSetting
from flux_batch.model.conditions.channels import fill_channels
from flux_batch.model.conditions.ip_adapter import IPAdapter, IPAdapterParams
from flux_batch.model.conditions.redux import Redux
from flux_batch.model.conditions.vision import ClipVisionEncoder, SiglipEncoder, build_tower
from flux_batch.model.optimize import quantize
from flux_batch.model.optimize.cuda_graphs import CudaGraphs
from flux_batch.model.optimize.quantize import to_fp8
from flux_batch.model.sampling import make_noise
from flux_batch.pipeline import compiled as compiling
from flux_batch.pipeline.images import latents as image_latents
from flux_batch.pipeline.images.ip_adapter import IPAdapterPrompts
from flux_batch.pipeline.images.redux import ReduxPrompts
from helpers.fake_cuda import CUDA, Waits, enter_cuda, fake_cuda
from helpers.graph_recorder import GraphRecorder
from helpers.lora_files import random_factors, write_lora

STEPS = 2
FULL: dict[str, Any] = {"height": 1024, "width": 1024, "num_inference_steps": STEPS, "output_type": "latent"}
MATRICES_IN_FP8 = 2 * 8 + 2 * 2


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of one matrix of each kind of block, written while tensors still have data."""
    shapes = {"transformer_blocks.0.attn.to_q": (3072, 3072), "single_transformer_blocks.1.proj_mlp": (12288, 3072)}
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    return write_lora(path, random_factors(shapes, max_rank=2), prefix="transformer.")


@pytest.fixture(scope="module")
def device(lora: Path) -> Iterator[Waits]:
    enter_cuda()
    dev = random_model.SIZES["dev"]
    short = replace(
        dev,
        transformer=replace(dev.transformer, depth=2, depth_single_blocks=2),
        clip={**dev.clip, "num_hidden_layers": 2},
        t5={**dev.t5, "num_layers": 2},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_model, "SIZES", {"dev": short})
        patch.setattr(quantize, "CHUNK_NUMBERS", 2**40)  # pieces would take a thousand operations
        with fake_cuda() as waits:
            yield waits


@pytest.fixture
def waits(device: Waits) -> Waits:
    """The waits of one test."""
    device.places.clear()
    device.numbers.clear()
    device.calls.clear()
    return device


@pytest.fixture(scope="module")
def dev(device: Waits) -> ModelManager:
    return random_manager("dev", "auto", CUDA)


def test_a_call_waits_once_for_the_images_and_their_check(
    dev: ModelManager, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[int] = []

    def noted(*given: Any) -> Tensor:
        products.append(waits.calls["mm"])
        return make_noise(*given)

    monkeypatch.setattr(image_latents, "make_noise", noted)
    pipe = FluxImagePipeline.from_model_manager(dev, compile=False)
    assert pipe.torch_dtype == torch.bfloat16
    options = {**FULL, "output_type": "np", "progress_bar": waits.steps}
    image = pipe("a cat", seed=1, **options)
    assert (image.shape, image.dtype) == ((1024, 1024, 3), "uint8")
    assert waits.places == ["pixels.as_output"]
    assert products[0] > 0  # the device encodes the texts while the host draws the noise


def test_guidance_by_a_negative_prompt_and_an_input_image(dev: ModelManager, waits: Waits) -> None:
    pipe = FluxImagePipeline.from_model_manager(dev, compile=False)
    image = Image.new("RGB", (64, 48))
    options: dict[str, Any] = {"cfg_scale": [1.0, 2.0], "negative_prompt": "bad", "progress_bar": waits.steps}
    how = {**FULL, "input_image": image, "denoising_strength": 0.5, "output_type": "pt"}
    images = pipe(["a cat", "a dog"], seed=[1, 2], **options, **how)
    assert images.is_cuda
    assert images.shape == (2, 3, 1024, 1024)
    assert waits.places == ["pixels.as_output"]


@pytest.mark.parametrize("how", ["tiles", "mask"])
def test_tiles_and_a_mask_wait_for_nothing_else(dev: ModelManager, waits: Waits, how: str) -> None:
    pipe = FluxImagePipeline.from_model_manager(dev, compile=False)
    options: dict[str, Any] = {"tiled": True, "tile_size": 96, "tile_stride": 96}
    if how == "mask":
        options = {"input_image": Image.new("RGB", (64, 64)), "mask_image": Image.new("L", (64, 64), 255)}
    pipe("a cat", seed=1, progress_bar=waits.steps, **{**FULL, "output_type": "np"}, **options)
    assert waits.places == ["pixels.as_output"]


def test_the_mask_of_a_fill_waits_for_nothing_else(waits: Waits) -> None:
    latents, mask = torch.zeros(2, 16, 128, 128, dtype=torch.bfloat16, device=CUDA), torch.ones(2, 1, 1024, 1024)
    assert fill_channels(latents, mask, 8).shape == (2, 4096, 64 + 256)
    assert waits.places == []


def test_a_gpu_without_bfloat16_computes_in_float16_and_decodes_in_float32(
    waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    pipe = FluxImagePipeline.from_model_manager(random_manager("dev", "auto", CUDA, "fp8"), compile=False)
    assert (pipe.torch_dtype, pipe.autoencoder.decoder.conv_in.weight.dtype) == (torch.float16, torch.float32)
    waits.places.clear()
    how = {**FULL, "input_image": Image.new("RGB", (64, 48)), "denoising_strength": 0.5, "output_type": "pt"}
    images = pipe("a cat", seed=1, progress_bar=waits.steps, **how)
    assert images.dtype == torch.float32
    assert waits.places == ["pixels.as_output"]


def test_nothing_strays_from_the_second_gpu(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    second = torch.device("cuda:1")
    pipe = FluxImagePipeline.from_model_manager(random_manager("dev", "auto", second), compile=False)
    how = {**FULL, "input_image": Image.new("RGB", (64, 48)), "denoising_strength": 0.5, "output_type": "pt"}
    assert pipe(["a cat", "a dog"], seed=[1, 2], progress_bar=waits.steps, **how).device == second


@pytest.mark.parametrize("quantization", ["fp8", "fp8_matmul"])
def test_narrow_weights_and_a_lora(waits: Waits, lora: Path, quantization: Any) -> None:
    pipe = FluxImagePipeline.from_model_manager(random_manager("dev", "auto", CUDA, quantization), compile=False)
    before = {name: id(tensor) for name, tensor in pipe.transformer.named_buffers()}
    pipe.set_loras([(lora, 1.0)])
    pipe.unload_loras()
    # Graphs and compiled code refer to addresses, so the tensors must stay the same.
    assert {name: id(tensor) for name, tensor in pipe.transformer.named_buffers()} == before
    waits.calls.clear()
    latents = pipe(["a cat", "a dog"], seed=[1, 2], progress_bar=waits.steps, **FULL)
    assert latents.shape == (2, 16, 128, 128)
    assert waits.calls["_scaled_mm"] == (STEPS * MATRICES_IN_FP8 if quantization == "fp8_matmul" else 0)


def test_a_step_cache_waits_once_an_image_to_decide(dev: ModelManager, waits: Waits) -> None:
    pipe = FluxImagePipeline.from_model_manager(dev, compile=False, step_cache=0.1)
    waits.numbers = [0.0, 1.0, 0.0, 0.0]  # reuse one of two images, then both
    places: list[list[str]] = []

    def steps(steps: Any) -> Iterator[int]:
        for step in steps:
            waits.places.clear()
            yield step
            places.append(list(waits.places))

    pipe(["a cat", "a dog"], seed=[1, 2], progress_bar=steps, **{**FULL, "num_inference_steps": 4})
    assert places[0] == places[3] == []
    assert places[2] == 2 * ["step_cache._to_compute"]
    assert places[1] == [*places[2], "step_cache.__call__"]  # reads the index of the image to compute


def test_graphs_record_one_step_and_launch_the_others(dev: ModelManager, waits: Waits) -> None:
    recorder = GraphRecorder()
    pipe = FluxImagePipeline.from_model_manager(dev, compile=False)
    pipe.graphs = CudaGraphs(pipe.transformer, recorder)
    pipe(["a cat", "a dog"], seed=[1, 2], progress_bar=waits.steps, **FULL)
    waits.calls.clear()
    latents = pipe(["a cat", "a dog"], seed=[1, 2], progress_bar=waits.steps, **FULL)
    assert latents.shape == (2, 16, 128, 128)
    assert (recorder.num_records, recorder.num_replays) == (1, 2 * STEPS)
    # Each step copies latents and modulation in one operation, each loop copies the texts once, and nothing copies the
    # table of positions. The fake recorder copies each result.
    assert waits.calls["_foreach_copy_"] == STEPS
    assert waits.calls["copy_"] == STEPS + 1


def test_a_step_is_tried_and_recorded_on_a_stream_of_the_models_own_device(
    dev: ModelManager, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Stream:
        def __init__(self, device: Any) -> None:
            self.name = str(device)

        def wait_stream(self, other: Any) -> None:
            events.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def entered(what: str, stream: Any) -> Iterator[None]:
        events.append(f"{what} on {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: entered("recorded", how["stream"]))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered("tried", stream))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("current"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    pipe = FluxImagePipeline.from_model_manager(dev, compile=False, cuda_graphs=True)
    pipe("a cat", seed=1, progress_bar=waits.steps, **FULL)
    assert events == [
        "cuda:0 waits for current",
        "tried on cuda:0",
        "current waits for cuda:0",
        "recorded on cuda:0",
    ]


def test_offloaded_text_encoders_visit_the_device(waits: Waits) -> None:
    pipe = FluxImagePipeline.from_model_manager(
        random_manager("dev", "auto", CUDA), compile=False, offload_text_encoders=True
    )
    waits.places.clear()
    visits: list[str] = []
    states = pipe.t5.states

    def noted(ids: Tensor) -> Tensor:
        visits.append(pipe.t5.model.shared.weight.device.type)
        return states(ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.t5, "states", noted)
        latents = pipe("a cat", seed=1, progress_bar=waits.steps, **FULL)
    assert latents.is_cuda
    assert visits == ["cuda"]
    assert {tensor.device.type for tensor in pipe.t5.model.parameters()} == {"cpu"}
    # Moving the weights does not wait; the embeddings go to host memory and back.
    assert waits.places == 4 * ["transformer.to"]


@pytest.mark.parametrize("quantization", ["none", "fp8_matmul"])
def test_the_benchmark_of_a_pipeline_comes_to_its_end(
    waits: Waits, monkeypatch: pytest.MonkeyPatch, quantization: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 40 * 10**9)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H100 {device}")
    how = {"random_weights": "dev", "device": "cuda", "quantization": quantization, "options": {"compile": False}}
    figures = bench_pipeline(Source(**how), Call(steps=STEPS), repeats=1)
    assert (figures["device"], figures["peak_tflops"]) == ("cuda:0", 989.4)
    assert figures["transformer_tflop_per_step_and_image"] > 1
    assert "memory    40 GB at most (allocated on the device)" in format_pipeline(figures)


def put_on_cuda(model: torch.nn.Module) -> None:
    """Replace the meta weights of a module by weights on CUDA."""
    for layer in model.modules():
        for name, weight in list(layer.named_parameters(recurse=False)):
            on_cuda = torch.empty(weight.shape, dtype=torch.bfloat16, device=CUDA)
            layer.register_parameter(name, torch.nn.Parameter(on_cuda, requires_grad=False))
        for name, positions in list(layer.named_buffers(recurse=False)):
            filled = torch.arange(positions.shape[-1], device=CUDA)[None]
            layer.register_buffer(name, filled, persistent=False)


@pytest.mark.long
@pytest.mark.parametrize("reader", ["redux", "ip_adapter"])
def test_image_prompts_beside_offloaded_text_encoders(waits: Waits, reader: str) -> None:
    pipe = FluxImagePipeline.from_model_manager(
        random_manager("dev", "auto", CUDA), compile=False, offload_text_encoders=True
    )
    tower: Any
    of_tower: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 16, "patch_size": 14}
    if reader == "redux":
        of_tower |= {"hidden_size": 1152, "intermediate_size": 4304, "image_size": 384}
        tower = build_tower(SiglipVisionConfig, SiglipVisionModel, of_tower)
        with torch.device("meta"):
            part: Any = Redux(1152, 12288, 4096)
        pipe.image_prompts.redux = ReduxPrompts(SiglipEncoder(tower), part)
    else:
        of_tower |= {"hidden_size": 1024, "intermediate_size": 4096, "image_size": 224, "projection_dim": 768}
        tower = build_tower(CLIPVisionConfig, CLIPVisionModelWithProjection, of_tower)
        with torch.device("meta"):
            part = IPAdapter(IPAdapterParams(embed_dim=768, num_tokens=16, token_dim=4096, hidden_size=3072, depth=2))
        pipe.image_prompts.ip_adapters = [IPAdapterPrompts(ClipVisionEncoder(tower), part, 24)]
    for module in (tower, part):
        put_on_cuda(module)
    options: dict[str, Any] = {"image_prompt": Image.new("RGB", (64, 48)), "cfg_scale": 2.0, "negative_prompt": "bad"}
    latents = pipe("a cat", seed=1, progress_bar=waits.steps, **options, **FULL)
    assert latents.is_cuda
    assert latents.dtype == torch.bfloat16
    assert {tensor.device.type for tensor in pipe.t5.model.parameters()} == {"cpu"}
    assert {tensor.device.type for module in (tower, part) for tensor in module.parameters()} == {"cuda"}


def test_blocks_are_compiled_by_default_and_shared_on_request_only(
    dev: ModelManager, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(compiling, "apply_compile", lambda model, attention: compiled.append(model))
    monkeypatch.setattr(compiling, "apply_compile_to_decoder", compiled.append)
    for compile in (None, True, False):
        pipe = FluxImagePipeline.from_model_manager(dev, compile=compile)
        assert compiled == ([] if compile is False else [dev.transformer, dev.autoencoder])
        assert (pipe.compile_cache is not None) == (compile is True)
        compiled.clear()


def test_a_gpu_that_cannot_compile_says_so_or_refuses(
    dev: ModelManager, waits: Waits, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*given: Any) -> None:
        raise ValueError("torch.compile does not work here: no Triton")

    monkeypatch.setattr(compiling, "apply_compile", fail)
    FluxImagePipeline.from_model_manager(dev)
    assert "blocks are not compiled, images take longer: torch.compile does not work here: no Triton" in caplog.text
    with pytest.raises(InvalidSetting, match=r"^compile = True: torch\.compile does not work here: no Triton$"):
        FluxImagePipeline.from_model_manager(dev, compile=True)


class TestWhatAGpuWouldNotTakeRaises:
    def test_a_table_on_the_cpu(self, dev: ModelManager, waits: Waits) -> None:
        pipe = FluxImagePipeline.from_model_manager(dev, compile=False)
        table = pipe.position_tables
        pipe.position_tables = lambda *size: table(*size).cpu()
        with pytest.raises(RuntimeError, match="same device"):
            pipe("a cat", seed=1, **FULL)

    def test_a_scale_of_another_shape(self, waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = FluxImagePipeline.from_model_manager(random_manager("dev", "auto", CUDA, "fp8_matmul"), compile=False)

        def without_scales_of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
            weight, scale = to_fp8(rows)
            return weight, scale[:-1]

        monkeypatch.setattr(quantize, "to_fp8", without_scales_of_rows)
        with pytest.raises(RuntimeError, match="scale"):
            pipe("a cat", seed=1, **FULL)

    def test_a_number_read_in_the_loop(self, dev: ModelManager, waits: Waits) -> None:
        pipe = FluxImagePipeline.from_model_manager(dev, compile=False)
        first_block = pipe.transformer.first_block

        def reading(*given: Any) -> Any:
            given[0].mean().item()
            return first_block(*given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipe.transformer, "first_block", reading)
            with pytest.raises(AssertionError, match=r"in the loop: .*transformer\.velocity"):
                pipe("a cat", seed=1, progress_bar=waits.steps, **FULL)
