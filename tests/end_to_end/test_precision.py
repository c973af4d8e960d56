"""dtypes, fp8 and the step cache in the pipeline, the manager and a job: their errors and their metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flux_batch import FluxImagePipeline, ModelManager
from flux_batch.config.schema import ModelConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import InvalidSetting, PlanMismatch
from flux_batch.images import read_provenance
from flux_batch.job import load_pipeline, run
from flux_batch.model import layers
from flux_batch.model.footprint import is_quantizable
from flux_batch.model.optimize.quantize import Fp8Linear, Fp8MatmulLinear
from flux_batch.pipeline import model_manager, precision
from helpers.fakes import make_fake_pipeline
from helpers.job_files import make_job, metadata
from helpers.tiny_flux import copy_repository, make_tiny_repository

SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 6, "output_type": "np"}
PROMPTS = ["a cat that holds a sign", "A dog, 2 birds & 1 hat", "x"]
SEEDS = [11, 12, 13]


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_repository(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def loud_repository(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose streams exceed the range of float16, although no single layer does."""
    folder = copy_repository(repository, tmp_path_factory.mktemp("models") / "loud")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for name, value in state.items():
        if name.endswith(
            ("ff.net.2.bias", "ff_context.net.2.bias", "blocks.0.proj_out.bias", "blocks.1.proj_out.bias")
        ):
            state[name] = torch.sign(value) * 50_000
        elif "norm" in name and name.endswith("linear.bias"):
            state[name] = value + 3  # the gates
    save_file(state, path, metadata={"format": "pt"})
    return folder


Load = Callable[..., FluxImagePipeline]


@pytest.fixture(scope="session")
def load(repository: Path) -> Load:
    """A function that loads the tiny model, once for each dtype and quantization."""
    loaded: dict[tuple[Any, ...], FluxImagePipeline] = {}

    def load_once(dtype: str = "bfloat16", quantization: Any = "none") -> FluxImagePipeline:
        if (dtype, quantization) not in loaded:
            loaded[dtype, quantization] = FluxImagePipeline.from_pretrained(
                repository, torch_dtype=dtype, device="cpu", quantization=quantization
            )
        return loaded[dtype, quantization]

    return load_once


def images(pipe: FluxImagePipeline, **options: Any) -> np.ndarray[Any, Any]:
    return np.stack(pipe(PROMPTS, seed=SEEDS, **SMALL | options)).astype(int)


def difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Return the mean difference, in levels from 0 to 255."""
    return float(np.abs(one - other).mean())


PARTS = {"transformer": "transformer", "text_encoder_2": "t5"}


class TestNarrowWeights:
    def test_widened_weights_give_what_float32_gives_of_weights_rounded_to_bfloat16(
        self, repository: Path, tmp_path: Path
    ) -> None:
        rounded = copy_repository(repository, tmp_path / "rounded")
        for part in PARTS:
            for path in (rounded / part).glob("*.safetensors"):
                state = load_file(path)
                narrow = {
                    name: value.bfloat16().float() if is_quantizable(PARTS[part], name, value.ndim) else value
                    for name, value in state.items()
                }
                save_file(narrow, path, metadata={"format": "pt"})
        options: dict[str, Any] = {**SMALL, "output_type": "latent"}
        exact = FluxImagePipeline.from_pretrained(rounded, torch_dtype="float32", device="cpu")
        widened = FluxImagePipeline.from_pretrained(
            rounded, torch_dtype="float32", device="cpu", quantization="bfloat16"
        )
        blocks = (
            widened.transformer.double_blocks[0].img_mlp[0],
            widened.t5.model.encoder.block[0].layer[0].SelfAttention.q,
        )
        assert {layer.weight.dtype for layer in blocks} == {torch.bfloat16}
        assert widened.autoencoder.decoder.conv_in.weight.dtype == torch.float32
        expected = exact(PROMPTS, seed=SEEDS, **options)
        torch.testing.assert_close(widened(PROMPTS, seed=SEEDS, **options), expected, rtol=0, atol=1e-5)

    def test_a_cpu_short_of_memory_keeps_bfloat16_and_one_with_room_float32(
        self, repository: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(precision, "native_dtype", lambda _: torch.float32)
        for free, expected in ((10_000, "bfloat16"), (10**12, "none")):
            monkeypatch.setattr(precision, "free_memory", lambda free=free: free)
            pipe = FluxImagePipeline.from_pretrained(repository, device="cpu")
            assert pipe.precision == {"dtype": "float32", "quantization": expected}

    def test_auto_is_a_name_of_it(self, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(precision, "native_dtype", lambda _: torch.bfloat16)
        pipe = FluxImagePipeline.from_pretrained(repository, torch_dtype="auto", device="cpu")
        assert (pipe.torch_dtype, pipe.quantization) == (torch.bfloat16, "none")

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_nothing_is_saved_beside_a_narrow_dtype(self, repository: Path, dtype: str) -> None:
        with pytest.raises(InvalidSetting, match=f"saves nothing in a model of {dtype}"):
            FluxImagePipeline.from_pretrained(repository, torch_dtype=dtype, device="cpu", quantization="bfloat16")

    def test_a_dtype_without_instructions_is_named(
        self, repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(precision, "native_dtype", lambda _: torch.float32)
        load_pipeline(ModelConfig(uri=str(repository), dtype="bfloat16"))
        assert "cpu has no instructions for bfloat16" in caplog.text
        caplog.clear()
        load_pipeline(ModelConfig(uri=str(repository)))
        assert caplog.text == ""


class TestQuantization:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_fp8_weights_give_nearly_the_same_images(self, load: Load, dtype: str) -> None:
        exact, quantised = images(load("float32")), images(load(dtype, "fp8"))
        assert 0 < difference(quantised, exact) < 3

    def test_fp8_products_cost_more_and_not_much(self, load: Load) -> None:
        assert difference(images(load("bfloat16", "fp8_matmul")), images(load("float32"))) < 4

    def test_which_layers_it_is(self, load: Load) -> None:
        pipe = load("bfloat16", "fp8_matmul")
        assert any(type(layer) is Fp8MatmulLinear for layer in pipe.transformer.modules())
        assert any(type(layer) is Fp8Linear for layer in pipe.transformer.modules())
        # T5's heads are multiplied in bfloat16.
        assert {type(layer) for layer in pipe.t5.model.modules() if isinstance(layer, Fp8Linear)} == {Fp8Linear}
        assert not any(isinstance(layer, Fp8Linear) for layer in pipe.clip.model.modules())
        assert pipe.torch_dtype == torch.bfloat16

    @pytest.mark.parametrize("quantization", ["fp8", "fp8_matmul"])
    def test_a_image_does_not_depend_on_its_neighbours(self, load: Load, quantization: str) -> None:
        pipe = load("bfloat16", quantization)
        alone = [pipe([prompt], seed=[seed], **SMALL)[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
        assert difference(np.stack(alone).astype(int), images(pipe)) < 1

    def test_the_dtype_that_diffsynths_scripts_ask_for(self, repository: Path) -> None:
        manager = ModelManager(torch.bfloat16, "cpu")
        manager.load_models([repository / "transformer"], torch_dtype=torch.float8_e4m3fn)
        manager.load_models([repository / name for name in ("text_encoder", "text_encoder_2", "vae")])
        pipe = FluxImagePipeline.from_model_manager(manager)
        assert any(isinstance(layer, Fp8Linear) for layer in pipe.transformer.modules())
        assert not any(isinstance(layer, Fp8Linear) for layer in pipe.t5.model.modules())
        assert pipe("x", seed=1, **SMALL).shape == (32, 48, 3)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (
                {"quantization": "fp9"},
                "quantization = 'fp9': must be one of none, bfloat16, fp8, fp8_matmul; did you mean 'fp8'?",
            ),
            ({"quantization": "fp8_matmul", "torch_dtype": "float16"}, "give bfloat16, not float16"),
            (
                {"torch_dtype": "float8_e4m3fn"},
                "float8_e4m3fn: must be bfloat16, float16, float32 or auto",
            ),
            ({"torch_dtype": torch.float64}, "must be bfloat16, float16, float32 or auto"),
            ({"step_cache": 2.0}, "step_cache = 2.0: must be from 0, which is off, to 1"),
        ],
    )
    def test_what_cannot_be_is_said(self, repository: Path, options: dict[str, Any], words: str) -> None:
        with pytest.raises(InvalidSetting) as caught:
            FluxImagePipeline.from_pretrained(repository, **{"device": "cpu"} | options)
        assert words in str(caught.value)

    def test_a_device_without_products_is_said_before_anything_is_loaded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model_manager, "fp8_matmul_obstacle", lambda device: "NVIDIA A100 cannot multiply in fp8")
        with pytest.raises(
            InvalidSetting, match=r"quantization = fp8_matmul: NVIDIA A100 cannot .*; use quantization fp8"
        ):
            FluxImagePipeline.from_pretrained(tmp_path / "nowhere", device="cpu", quantization="fp8_matmul")


class TestFloat16:
    def test_it_is_near_float32(self, load: Load) -> None:
        assert difference(images(load("float16")), images(load("float32"))) < 1
        assert load("float16").autoencoder.decoder.conv_in.weight.dtype == torch.float32

    @pytest.mark.parametrize("quantization", ["none", "fp8"])
    def test_streams_that_overflow_still_make_images(
        self, loud_repository: Path, quantization: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipe = FluxImagePipeline.from_pretrained(
            loud_repository, torch_dtype="float16", device="cpu", quantization=quantization
        )
        for image in images(pipe):
            assert image.std() > 5
        monkeypatch.setattr(layers, "finite", lambda x: x)
        latents = pipe(PROMPTS, seed=SEEDS, **SMALL | {"output_type": "latent"})
        assert not latents.isfinite().all()  # so the test above could fail

    def test_bfloat16_is_not_clipped(self) -> None:
        x = torch.tensor([1e6, float("-inf")])
        assert torch.equal(layers.finite(x.bfloat16()), x.bfloat16())
        assert torch.equal(layers.finite(x), x)
        assert layers.finite(x.half()).tolist() == [65504, -65504]


class TestStepCache:
    def test_0_is_off(self, load: Load) -> None:
        pipe = load("float32")
        assert np.array_equal(images(pipe, step_cache=0.0), images(pipe))

    def test_a_high_threshold_changes_images_and_a_low_one_does_not(self, load: Load) -> None:
        pipe = load("float32")
        assert difference(images(pipe, step_cache=1.0), images(pipe)) > 0
        assert np.array_equal(images(pipe, step_cache=1e-9), images(pipe))

    @pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
    def test_a_image_does_not_depend_on_its_neighbours(self, load: Load, cfg_scale: float) -> None:
        pipe, options = load("float32"), {"step_cache": 0.4, "cfg_scale": cfg_scale}
        alone = [
            pipe([prompt], seed=[seed], **SMALL, **options)[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
        ]
        assert np.abs(np.stack(alone).astype(int) - images(pipe, **options)).max() <= 1

    def test_the_pipelines_own_threshold_holds_for_calls_that_name_none(self, load: Load, repository: Path) -> None:
        pipe = FluxImagePipeline.from_pretrained(repository, torch_dtype="float32", device="cpu", step_cache=1.0)
        assert np.array_equal(images(pipe), images(load("float32"), step_cache=1.0))
        assert np.array_equal(images(pipe, step_cache=0), images(load("float32")))

    def test_it_works_from_a_image(self, load: Load) -> None:
        image = Image.new("RGB", (48, 32), "red")
        made = images(load("float32"), step_cache=1.0, input_image=image, denoising_strength=0.7)
        assert made.shape == (3, 32, 48, 3)

    @pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "much"])
    def test_other_thresholds_are_refused(self, load: Load, value: Any) -> None:
        with pytest.raises(InvalidSetting, match="step_cache = "):
            images(load("float32"), step_cache=value)


class TestJob:
    LOSSY: ClassVar[dict[str, Any]] = {"uri": "demo", "quantization": "fp8", "step_cache": 0.1}

    def test_what_was_traded_is_in_the_metadata_and_in_the_images(self, tmp_path: Path) -> None:
        job = make_job(tmp_path, [{"prompt": "a"}, {"prompt": ""}], model=self.LOSSY, output={"format": "files"})
        run(job, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
        rows = metadata(job)
        assert [row["status"] for row in rows] == ["success", "failed"]
        assert [(row["model"], row["quantization"], row["step_cache"]) for row in rows] == [("demo", "fp8", 0.1)] * 2
        said = read_provenance((tmp_path / "out" / rows[0]["file_name"]).read_bytes())
        assert (said["quantization"], said["step_cache"]) == ("fp8", 0.1)

    def test_a_job_without_trades_says_so(self, tmp_path: Path) -> None:
        job = make_job(tmp_path, [{"prompt": "a"}])
        run(job, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
        assert [(row["quantization"], row["step_cache"]) for row in metadata(job)] == [("none", 0.0)]

    @pytest.mark.parametrize("change", [{"quantization": "none"}, {"step_cache": 0.2}])
    def test_a_run_does_not_go_on_with_other_arithmetic(self, tmp_path: Path, change: dict[str, Any]) -> None:
        run(make_job(tmp_path, model=self.LOSSY), engine=LocalEngine(), make_pipeline=make_fake_pipeline)
        with pytest.raises(PlanMismatch, match=f"model.{next(iter(change))}"):
            run(make_job(tmp_path, model=self.LOSSY | change), engine=LocalEngine(), make_pipeline=make_fake_pipeline)

    def test_the_model_section_reaches_the_pipeline(self, repository: Path) -> None:
        model = make_job(repository.parent, model=self.LOSSY | {"uri": str(repository)}).model
        pipe: Any = load_pipeline(model)
        assert pipe.step_cache == 0.1
        assert any(isinstance(layer, Fp8Linear) for layer in pipe.transformer.modules())
