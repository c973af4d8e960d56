import pytest
import torch

from flux_batch.bench.pipeline.random_model import SIZES, random_manager
from flux_batch.bench.source import Source
from flux_batch.model.optimize.quantize import Fp8Linear
from flux_batch.model.transformer import Flux
from flux_batch.pipeline.pipeline import FluxImagePipeline

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_images_of_a_random_model_vary_within_and_not_between_runs(dtype: str) -> None:
    source = Source(random_weights="tiny", device="cpu", dtype=dtype)

    def draw(seed: int) -> torch.Tensor:
        pixels = source.open()("a circle", width=64, height=64, num_inference_steps=3, seed=seed, output_type="pt")
        return torch.as_tensor(pixels)

    first = draw(1)
    assert first.isfinite().all()
    assert first.std() > 0.05
    assert first.abs().lt(1.0).float().mean() > 0.8  # not clipped to black and white
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))


def test_dev_is_the_model_of_12_billion_and_schnell_embeds_no_guidance() -> None:
    counts = {}
    for name in ("dev", "schnell"):
        with torch.device("meta"):
            model = Flux(SIZES[name].transformer)
        counts[name] = sum(parameter.numel() for parameter in model.parameters())

    assert counts["dev"] == 11_901_408_320
    assert SIZES["schnell"].schedule.use_dynamic_shifting is False
    assert counts["schnell"] < counts["dev"]


def test_text_encoders_of_dev_have_the_size_of_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from flux_batch.bench.pipeline import random_model

    monkeypatch.setattr(random_model, "load_weights", lambda model, state, prepare: model)  # stays on meta
    t5 = random_model.random_t5(SIZES["dev"], torch.bfloat16, CPU, "none")
    clip = random_model.random_clip(SIZES["dev"], torch.bfloat16, CPU)

    assert sum(parameter.numel() for parameter in t5.model.parameters()) == 4_762_310_656
    assert sum(parameter.numel() for parameter in clip.model.parameters()) == 123_060_480


def test_quantization_reaches_the_blocks() -> None:
    manager = random_manager("tiny", "bfloat16", CPU, "fp8")

    assert manager.transformer is not None
    assert any(isinstance(module, Fp8Linear) for module in manager.transformer.modules())
    pipeline = FluxImagePipeline.from_model_manager(manager)
    pixels = pipeline("x", width=32, height=32, num_inference_steps=1, seed=0, output_type="pt")
    assert pixels.isfinite().all()
