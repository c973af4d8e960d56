import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flux_batch.bench.figures import alternated
from flux_batch.bench.pipeline import pipeline as module
from flux_batch.bench.pipeline import stages as stages_module
from flux_batch.bench.pipeline.pipeline import Call, bench_pipeline, find_peers, format_pipeline, level_differences
from flux_batch.bench.pipeline.stages import StageClock
from flux_batch.bench.source import Source
from flux_batch.errors import JobError
from flux_batch.pipeline.pipeline import FluxImagePipeline
from flux_batch.pipeline.texts import TextEncoders

SMALL = Call(width=64, height=64, steps=3, batch_size=2, t5_sequence_length=32)


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """The demo model beside diffusers, in float32."""
    return bench_pipeline(Source(device="cpu", dtype="float32"), SMALL, repeats=2, against=["diffusers"], peak=1.0)


def test_images_equal_those_of_diffusers(figures: dict[str, Any]) -> None:
    peer = figures["against"]["diffusers"]

    assert peer["largest_difference_in_levels"] <= 2
    assert peer["mean_difference_in_levels"] < 0.1
    assert len(peer["seconds_per_image"]["values"]) == 2


def test_stages_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(s=0.0)
    encode, denoise = TextEncoders.encode, FluxImagePipeline.make_latents

    def slow_encode(*args: Any, **others: Any) -> Any:
        now.s += 1.0
        return encode(*args, **others)

    def slow_denoise(*args: Any, **others: Any) -> Any:
        now.s += 6.0
        return denoise(*args, **others)

    monkeypatch.setattr(TextEncoders, "encode", slow_encode)
    monkeypatch.setattr(FluxImagePipeline, "make_latents", slow_denoise)
    monkeypatch.setattr(stages_module, "StageClock", partial(StageClock, clock=lambda: now.s))
    monkeypatch.setattr(module, "alternated", partial(alternated, clock=lambda: now.s))
    figures = bench_pipeline(Source(random_weights="tiny", device="cpu", dtype="float32"), SMALL, repeats=2)
    stages = {stage: seconds["values"] for stage, seconds in figures["seconds_per_image_by_stage"].items()}

    assert list(stages) == ["tokenise", "CLIP", "T5", "denoise", "VAE", "uint8", "PNG"]
    assert {stage for stage, values in stages.items() if any(values)} == {"tokenise", "denoise"}
    assert stages["tokenise"] == [0.5, 0.5]
    assert stages["denoise"] == [3.0, 3.0]
    assert figures["seconds_per_image"]["values"] == [3.5, 3.5]
    assert figures["seconds_per_step_and_image"]["values"] == [1.0, 1.0]


def test_utilisation_is_the_transformers_share_of_the_given_peak(figures: dict[str, Any]) -> None:
    flops, step_s = figures["transformer_tflop_per_step_and_image"], figures["seconds_per_step_and_image"]["median"]

    assert figures["utilisation_of_denoising"] == pytest.approx(flops / step_s / 1.0)
    assert figures["call"]["t5_sequence_length"] == 32
    assert figures["peak_memory_bytes"] > 50e6


def test_the_text_has_a_line_a_stage_and_the_ratio(figures: dict[str, Any]) -> None:
    text = format_pipeline(figures)

    for words in ("demo, float32, cpu: 64 x 64, 3 steps, batch 2", "VAE", "whole call", "of 1;", "times as fast"):
        assert words in text
    unknown = format_pipeline({**figures, "peak_tflops": None})
    assert "utilisation not known" in unknown


def test_a_difference_of_one_image_is_found() -> None:
    ours = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    theirs = ours.copy()
    theirs[1, 2, 3, 0] = 255

    assert level_differences(list(ours), list(theirs)).max() == 255


def test_each_repeat_has_other_texts_and_seeds() -> None:
    call = Call(batch_size=3)

    texts = [text for repeat in range(4) for text in call.prompts(repeat)]
    seeds = [seed for repeat in range(-1, 4) for seed in call.seeds(repeat)]
    assert len(set(texts)) == 12
    assert len(set(seeds)) == 15
    assert min(seeds) >= 0


def test_without_diffusers_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "flux_batch.bench.pipeline.peer", raising=False)

    with pytest.raises(JobError, match="diffusers cannot be imported") as caught:
        find_peers(["diffusers"])
    assert caught.value.exit_code == 2


def test_a_decoder_of_another_dtype_than_the_model_is_compared_too() -> None:
    call = Call(width=64, height=64, steps=1, t5_sequence_length=32)
    figures = bench_pipeline(Source(device="cpu", dtype="float16"), call, repeats=1, against=["diffusers"])

    assert figures["against"]["diffusers"]["mean_difference_in_levels"] < 0.5


def test_fp8_weights_cannot_be_compared_with_diffusers() -> None:
    source = Source(random_weights="tiny", device="cpu", quantization="fp8")

    with pytest.raises(JobError, match="leave out --quantization"):
        bench_pipeline(source, SMALL, repeats=1, against=["diffusers"])


@pytest.mark.parametrize("quantization", ["bfloat16", "fp8", "fp8_matmul"])
def test_a_step_with_narrow_weights_has_the_operations_of_one_without(quantization: Any) -> None:
    call = Call(width=64, height=64, steps=1, t5_sequence_length=32)
    dtype = "float32" if quantization == "bfloat16" else "auto"
    narrow, plain = (
        bench_pipeline(Source(random_weights="tiny", device="cpu", dtype=dtype, quantization=each), call, repeats=1)
        for each in (quantization, "none")
    )

    assert narrow["quantization"] == quantization
    name = "transformer_tflop_per_step_and_image"
    assert narrow[name] == plain[name] > 0


def test_an_option_that_the_pipeline_lacks_is_named() -> None:
    with pytest.raises(JobError, match="stepcache"):
        Source(random_weights="tiny", device="cpu", options={"stepcache": 0.1}).open()
