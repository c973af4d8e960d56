"""The pipeline against diffusers on tiny random models, and its behaviour at its border."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from PIL import Image
from torch import Tensor

from flux_batch import FluxImagePipeline, ModelManager
from flux_batch.errors import CheckpointError, DeviceFatal, InvalidSetting, OutOfMemory, RowError
from flux_batch.model.optimize.cuda_graphs import CudaGraphs
from flux_batch.model.sampling import make_generators, make_noise, pack
from flux_batch.pipeline.model_manager import device_errors
from flux_batch.prompts.input_images import decode
from helpers import tiny_flux
from helpers.golden import tensor
from helpers.graph_recorder import GraphRecorder
from helpers.tiny_flux import CLIP_WIDTH, T5_WIDTH, TinyFlux, copy_repository, make_tiny_repository

CPU = {"torch_dtype": torch.float32, "device": "cpu"}
PROMPTS = ["a cat that holds a sign", "A dog, 2 birds & 1 hat", "x"]
SEEDS = [11, 2**40, 0]
SMALL = {"height": 64, "width": 96, "num_inference_steps": 3}

CONFIGS = {
    "dev": TinyFlux(),
    "schnell": TinyFlux(guidance_embed=False, dynamic_shift=False, t5_max_length=256),
    "heads of 128": TinyFlux(axes_dim=(16, 56, 56), num_heads=1, depth=1, depth_single_blocks=1),
    "1 and 5 blocks": TinyFlux(num_heads=3, depth=1, depth_single_blocks=5, seed=3),
    "4 and 1 blocks": TinyFlux(axes_dim=(2, 4, 2), num_heads=5, depth=4, depth_single_blocks=1, seed=4),
}


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every configuration in the diffusers layout."""
    folder = tmp_path_factory.mktemp("models")
    return {name: make_tiny_repository(folder / name, config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="session")
def repository(repositories: dict[str, Path]) -> Path:
    return repositories["dev"]


@pytest.fixture(scope="session")
def original_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `repository` in the original layout."""
    return make_tiny_repository(tmp_path_factory.mktemp("models") / "original", CONFIGS["dev"], layout="original")


@pytest.fixture(scope="session")
def pipe(repository: Path) -> FluxImagePipeline:
    return FluxImagePipeline.from_pretrained(repository, **CPU)


@pytest.fixture(scope="session")
def reference(repository: Path) -> FluxPipeline:
    return load_reference(repository)


@pytest.fixture(scope="session")
def img2img(repository: Path) -> FluxImg2ImgPipeline:
    return load_reference(repository, FluxImg2ImgPipeline)


def with_graphs(pipe: FluxImagePipeline, recorder: GraphRecorder) -> FluxImagePipeline:
    """Return a pipeline of the same parts that records the steps of its transformer."""
    parts = pipe.transformer, pipe.autoencoder, pipe.clip, pipe.t5, pipe.schedule
    return FluxImagePipeline(*parts, graphs=CudaGraphs(pipe.transformer, recorder))


def noise_image(width: int, height: int) -> Image.Image:
    values = tensor("in.image", (height, width, 3)).add(1).mul(127.5).to(torch.uint8)
    return Image.fromarray(values.numpy())


def load_reference(folder: Path, kind: type = FluxPipeline, dtype: torch.dtype = torch.float32) -> Any:
    reference = kind.from_pretrained(folder, dtype=dtype)
    reference.set_progress_bar_config(disable=True)
    return reference


def as_reference_arguments(
    prompts: Sequence[str], seeds: Sequence[int], *, output_type: str, **options: Any
) -> dict[str, Any]:
    return {
        "prompt": list(prompts),
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "output_type": output_type,
        **options,
    }


def reference_latents(reference: Any, height: int, width: int, **arguments: Any) -> Tensor:
    """Return what diffusers has when it stops, unpacked."""
    with torch.inference_mode():
        tokens = reference(height=height, width=width, **arguments).images
    return reference._unpack_latents(tokens, height, width, reference.vae_scale_factor)


def assert_same(
    pipe: FluxImagePipeline,
    reference: Any,
    *,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = SEEDS,
    height: int = 64,
    width: int = 96,
    num_inference_steps: int = 3,
    ours: dict[str, Any] | None = None,
    theirs: dict[str, Any] | None = None,
) -> None:
    """Assert latents within 1e-4 and pixels within one level of those of diffusers."""
    size = {"height": height, "width": width, "num_inference_steps": num_inference_steps}
    for output_type in ("latent", "pil"):
        arguments = as_reference_arguments(prompts, seeds, output_type=output_type, **size, **(theirs or {}))
        result = pipe(list(prompts), seed=list(seeds), output_type=output_type, **size, **(ours or {}))
        if output_type == "latent":
            torch.testing.assert_close(result, reference_latents(reference, **arguments), atol=1e-4, rtol=0)
        else:
            for image, expected in zip(result, reference(**arguments).images, strict=True):
                assert_within_one_level(image, expected)


def assert_within_one_level(image: Image.Image, expected: Image.Image) -> None:
    assert image.size == expected.size
    assert image.mode == expected.mode == "RGB"
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1


class TestParity:
    """Live comparison with diffusers; every image has its own CPU generator."""

    @pytest.mark.parametrize("name", CONFIGS)
    def test_every_configuration(self, repositories: dict[str, Path], name: str) -> None:
        pipe = FluxImagePipeline.from_pretrained(repositories[name], **CPU)
        length = 256 if name == "schnell" else 512
        assert pipe.default_t5_sequence_length == length
        theirs = {"max_sequence_length": length, "guidance_scale": 3.5}
        assert_same(pipe, load_reference(repositories[name]), theirs=theirs)

    def test_original_layout(self, original_repository: Path, reference: FluxPipeline) -> None:
        pipe = FluxImagePipeline.from_pretrained(original_repository, **CPU)
        assert_same(pipe, reference, theirs={"guidance_scale": 3.5})

    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_bfloat16_is_rounded_in_the_same_places(self, repository: Path, prompt: str) -> None:
        """An image at a time: diffusers encodes the texts of a batch together, which rounds them otherwise."""
        reference = load_reference(repository, dtype=torch.bfloat16)
        ours = FluxImagePipeline.from_pretrained(repository, torch_dtype="bfloat16", device="cpu")
        size = {"height": 64, "width": 96, "num_inference_steps": 4}
        (expected,) = reference(**as_reference_arguments([prompt], [7], output_type="pil", **size)).images
        assert np.array_equal(np.asarray(ours(prompt, seed=7, **size)), np.asarray(expected))

    def test_sharded_transformer(self, tmp_path: Path, reference: FluxPipeline) -> None:
        folder = make_tiny_repository(tmp_path / "sharded", CONFIGS["dev"], max_shard_size="100KB")
        assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
        pipe = FluxImagePipeline.from_pretrained(folder, **CPU)
        assert_same(pipe, reference, prompts=PROMPTS[:1], seeds=[5])

    @pytest.mark.parametrize(("height", "width"), [(16, 16), (128, 128), (208, 48), (16, 272)])
    def test_sizes(self, pipe: FluxImagePipeline, reference: FluxPipeline, height: int, width: int) -> None:
        assert_same(pipe, reference, height=height, width=width, num_inference_steps=2)

    @pytest.mark.parametrize("guidance", [0.0, 1.0, 3.5, 10.0])
    def test_embedded_guidance(self, pipe: FluxImagePipeline, reference: FluxPipeline, guidance: float) -> None:
        ours, theirs = {"embedded_guidance": guidance}, {"guidance_scale": guidance}
        assert_same(pipe, reference, ours=ours, theirs=theirs, num_inference_steps=2)

    def test_embedded_guidance_changes_the_image(self, pipe: FluxImagePipeline) -> None:
        low, high = pipe(["x", "x"], seed=1, embedded_guidance=[1.0, 10.0], output_type="latent", **SMALL)
        assert (low - high).abs().max() > 1e-2

    @pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
    def test_true_cfg(self, pipe: FluxImagePipeline, reference: FluxPipeline, scale: float) -> None:
        negative = ["blurry", "", "a cat"]
        ours = {"negative_prompt": negative, "cfg_scale": scale}
        assert_same(pipe, reference, ours=ours, theirs={"negative_prompt": negative, "true_cfg_scale": scale})

    @pytest.mark.parametrize("num_steps", [1, 2, 28])
    @pytest.mark.parametrize("name", ["dev", "schnell"])
    def test_numbers_of_steps(self, repositories: dict[str, Path], name: str, num_steps: int) -> None:
        pipe = FluxImagePipeline.from_pretrained(repositories[name], **CPU)
        assert_same(
            pipe,
            load_reference(repositories[name]),
            prompts=PROMPTS[:1],
            seeds=[9],
            height=32,
            width=48,
            num_inference_steps=num_steps,
            ours={"t5_sequence_length": 64},
            theirs={"max_sequence_length": 64},
        )

    @pytest.mark.filterwarnings("ignore:a prompt is longer than T5 reads")
    @pytest.mark.parametrize("length", [1, 256, 512])
    def test_t5_lengths(self, pipe: FluxImagePipeline, reference: FluxPipeline, length: int) -> None:
        ours, theirs = {"t5_sequence_length": length}, {"max_sequence_length": length}
        assert_same(pipe, reference, ours=ours, theirs=theirs, num_inference_steps=2)

    def test_prompts_longer_than_the_text_encoders_read(self, pipe: FluxImagePipeline, reference: FluxPipeline) -> None:
        prompts = ["a long prompt " * 60, "b " * 300]
        assert pipe.truncations(prompts) == [(True, True)] * 2
        with pytest.warns(UserWarning, match="longer than (CLIP|T5) reads, its end is left out"):
            assert_same(pipe, reference, prompts=prompts, seeds=[1, 2], num_inference_steps=2)

    def test_spellings_of_diffusers(self, pipe: FluxImagePipeline, reference: FluxPipeline) -> None:
        same = {"guidance_scale": 2.0, "true_cfg_scale": 3.0, "max_sequence_length": 40, "negative_prompt": "no"}
        theirs = {**same, "negative_prompt": ["no"] * 3}
        assert_same(pipe, reference, ours=same, theirs=theirs, num_inference_steps=2)

    @pytest.mark.parametrize(
        "change",
        [
            {"use_dynamic_shifting": False, "shift": 3.0},
            {"use_dynamic_shifting": True, "base_shift": 0.2, "max_shift": 2.5},
            {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64},
        ],
        ids=["static", "shifts", "lengths"],
    )
    def test_schedule_from_the_folder(self, repository: Path, tmp_path: Path, change: dict[str, Any]) -> None:
        folder = copy_repository(repository, tmp_path / "model")
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        assert_same(FluxImagePipeline.from_pretrained(folder, **CPU), load_reference(folder), num_inference_steps=4)

    @pytest.mark.parametrize(
        ("strength", "size"), [(1.0, (96, 64)), (0.6, (96, 64)), (0.3, (50, 70)), (0.01, (9, 999))]
    )
    def test_image_to_image(
        self, pipe: FluxImagePipeline, img2img: FluxImg2ImgPipeline, strength: float, size: tuple[int, int]
    ) -> None:
        assert_same(
            pipe,
            img2img,
            num_inference_steps=5,
            ours={"input_image": noise_image(*size), "denoising_strength": strength},
            theirs={"image": [noise_image(*size)] * 3, "strength": strength, "guidance_scale": 3.5},
        )

    @pytest.mark.parametrize(
        ("num_steps", "strength"), [(1, 0.5), (1, 1.0), (4, 0.25), (10, 0.8), (10, 0.85), (10, 0.99), (28, 0.1)]
    )
    def test_image_to_image_starts_at_the_same_step(
        self, pipe: FluxImagePipeline, img2img: FluxImg2ImgPipeline, num_steps: int, strength: float
    ) -> None:
        assert_same(
            pipe,
            img2img,
            prompts=PROMPTS[:1],
            seeds=[9],
            height=32,
            width=48,
            num_inference_steps=num_steps,
            ours={"input_image": noise_image(48, 32), "denoising_strength": strength, "t5_sequence_length": 64},
            theirs={
                "image": [noise_image(48, 32)],
                "strength": strength,
                "guidance_scale": 3.5,
                "max_sequence_length": 64,
            },
        )

    @pytest.mark.parametrize(("height", "width"), [(16, 16), (128, 96), (48, 208)])
    @pytest.mark.parametrize("scale", [1.0, 2.5])
    def test_image_to_image_of_several_with_true_cfg(
        self, pipe: FluxImagePipeline, img2img: FluxImg2ImgPipeline, height: int, width: int, scale: float
    ) -> None:
        images = [noise_image(40, 30), noise_image(width, height), noise_image(7, 300)]
        negative = ["blurry", "", "a cat"]
        ours = {"input_image": images, "denoising_strength": 0.7, "negative_prompt": negative, "cfg_scale": scale}
        theirs = {"image": images, "strength": 0.7, "negative_prompt": negative, "true_cfg_scale": scale}
        theirs |= {"guidance_scale": 3.5}
        assert_same(pipe, img2img, height=height, width=width, ours=ours, theirs=theirs)

    def test_image_to_image_of_schnell(self, repositories: dict[str, Path]) -> None:
        reference = load_reference(repositories["schnell"], FluxImg2ImgPipeline)
        pipe = FluxImagePipeline.from_pretrained(repositories["schnell"], **CPU)
        ours = {"image": noise_image(40, 30), "strength": 0.6}
        theirs = {"image": [noise_image(40, 30)] * 3, "strength": 0.6, "max_sequence_length": 256}
        assert_same(pipe, reference, num_inference_steps=4, ours=ours, theirs=theirs)

    def test_noise_is_that_of_a_cpu_generator_an_image(self, reference: FluxPipeline) -> None:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
        theirs, _ = reference.prepare_latents(3, 16, 64, 96, torch.float32, torch.device("cpu"), generators)
        ours = make_noise((16, 8, 12), make_generators(SEEDS))
        assert torch.equal(reference._pack_latents(ours, 3, 16, 8, 12), theirs)


class TestInputImages:
    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "CMYK", "L", "1"])
    def test_images_of_other_modes_start_as_they_do_in_a_job(self, pipe: FluxImagePipeline, mode: str) -> None:
        """diffusers takes no alpha, and its load_image shows what lies under it."""
        samples = np.arange(32 * 48, dtype=np.uint16).reshape(32, 48) * 40
        image = Image.fromarray(samples) if mode == "I;16" else noise_image(48, 32).convert(mode)
        if "A" in mode:
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        buffer = io.BytesIO()
        image.save(buffer, "TIFF")
        in_a_job = decode(buffer.getvalue())
        common = {"denoising_strength": 0.5, "seed": 1, "output_type": "latent", **SMALL}
        assert torch.equal(pipe("x", input_image=image, **common), pipe("x", input_image=in_a_job, **common))

    def test_what_is_transparent_is_white(self, pipe: FluxImagePipeline) -> None:
        common = {"denoising_strength": 0.5, "seed": 1, "output_type": "latent", **SMALL}
        clear, white = Image.new("RGBA", (48, 32), (9, 9, 9, 0)), Image.new("RGB", (48, 32), "white")
        assert torch.equal(pipe("x", input_image=clear, **common), pipe("x", input_image=white, **common))


class TestRepeatability:
    def test_a_image_does_not_depend_on_its_neighbours(self, pipe: FluxImagePipeline) -> None:
        options = {
            "negative_prompt": ["", "no", "x"],
            "embedded_guidance": [1.0, 3.5, 8.0],
            "cfg_scale": [2.0, 1.0, 3.0],
        }
        together = pipe(PROMPTS, seed=SEEDS, **options, **SMALL)
        for i, prompt in enumerate(PROMPTS):
            alone = pipe(prompt, seed=SEEDS[i], **{name: values[i] for name, values in options.items()}, **SMALL)
            assert_within_one_level(together[i], alone)

    def test_the_same_call_is_bit_for_bit_the_same(self, pipe: FluxImagePipeline) -> None:
        first = pipe("x", seed=3, output_type="latent", **SMALL)
        assert torch.equal(pipe("x", seed=3, output_type="latent", **SMALL), first)
        assert not torch.equal(pipe("x", seed=4, output_type="latent", **SMALL), first)

    def test_mixed_cfg_scales_each_equal_their_own(self, pipe: FluxImagePipeline) -> None:
        common = {"negative_prompt": "bad", "seed": 8, "output_type": "latent", **SMALL}
        mixed = pipe(["x", "x"], cfg_scale=[1.0, 2.0], **common)
        for i, scale in enumerate([1.0, 2.0]):
            torch.testing.assert_close(mixed[i : i + 1], pipe("x", cfg_scale=scale, **common), atol=1e-5, rtol=0)
        assert (mixed[0] - mixed[1]).abs().max() > 1e-2

    def test_no_seed_follows_the_global_generator(self, pipe: FluxImagePipeline) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(6)
            first = pipe(["x", "x"], output_type="latent", **SMALL)
            after = pipe(["x", "x"], output_type="latent", **SMALL)
            torch.manual_seed(6)
            assert torch.equal(pipe(["x", "x"], output_type="latent", **SMALL), first)
        assert not torch.equal(first, after)
        assert not torch.equal(first[0], first[1])

    def test_a_seeded_call_leaves_the_global_generator_alone(self, pipe: FluxImagePipeline) -> None:
        before = torch.get_rng_state()
        pipe("x", seed=3, output_type="latent", **SMALL)
        assert torch.equal(torch.get_rng_state(), before)

    def test_sigma_shift_replaces_the_schedule(self, pipe: FluxImagePipeline) -> None:
        common = {"seed": 1, "output_type": "latent", **SMALL}
        assert not torch.equal(pipe("x", sigma_shift=3.0, **common), pipe("x", **common))

    def test_bfloat16_is_finite_and_near(self, repository: Path, pipe: FluxImagePipeline) -> None:
        half = FluxImagePipeline.from_pretrained(repository, torch_dtype="bfloat16", device="cpu")
        ours = half(PROMPTS, seed=SEEDS, output_type="latent", **SMALL)
        exact = pipe(PROMPTS, seed=SEEDS, output_type="latent", **SMALL)
        assert ours.dtype == torch.bfloat16
        assert ours.isfinite().all()
        assert (ours.float() - exact).norm() / exact.norm() < 0.03

    def test_tables_of_sizes_are_kept_and_change_nothing(self, repository: Path) -> None:
        pipe = FluxImagePipeline.from_pretrained(repository, **CPU)
        options = {"seed": 3, "output_type": "latent", "num_inference_steps": 1, "t5_sequence_length": 16}
        first = [pipe("x", height=height, width=width, **options) for height, width in ((32, 48), (48, 32), (32, 48))]
        assert pipe.position_tables.cache_info().currsize == 2
        fresh = FluxImagePipeline.from_pretrained(repository, **CPU)
        again = [fresh("x", height=height, width=width, **options) for height, width in ((48, 32), (32, 48))]
        assert torch.equal(first[0], first[2])
        assert torch.equal(first[1], again[0])
        assert torch.equal(first[0], again[1])

    def test_each_step_of_both_passes_is_a_recorded_one(self, pipe: FluxImagePipeline) -> None:
        options = {"seed": 3, "cfg_scale": 2.0, "negative_prompt": "bad", "output_type": "latent", **SMALL}
        recorder = GraphRecorder()
        assert torch.equal(with_graphs(pipe, recorder)("x", **options), pipe("x", **options))
        assert (recorder.num_records, recorder.num_replays) == (1, 2 * SMALL["num_inference_steps"])

    def test_text_encoders_that_are_to_be_offloaded_stay_on_the_cpu(
        self, repository: Path, pipe: FluxImagePipeline
    ) -> None:
        ours = FluxImagePipeline.from_pretrained(repository, offload_text_encoders=True, **CPU)
        options = {"seed": 3, "output_type": "latent", **SMALL}
        assert torch.equal(ours("x", **options), pipe("x", **options))


class TestWaysOfDiffSynth:
    def first_tokens(self, pipe: FluxImagePipeline, **options: Any) -> list[Tensor]:
        """Return what the transformer is given at each step."""
        seen: list[Tensor] = []
        hook = pipe.transformer.img_in.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
        try:
            pipe("x", seed=3, output_type="latent", **SMALL, **options)
        finally:
            hook.remove()
        return seen

    @pytest.mark.parametrize("strength", [0.01, 0.6, 1.0])
    def test_static_shift_runs_all_steps_from_the_mean_of_the_image(
        self, pipe: FluxImagePipeline, strength: float
    ) -> None:
        """fed7b18: FlowMatchScheduler.set_timesteps_flux and FluxImageUnit_InputImageEmbedder."""
        image = noise_image(96, 64)
        seen = self.first_tokens(pipe, input_image=image, denoising_strength=strength, sigma_shift=3.0)

        low = 0.003 / 1.002
        start = low + (1 - low) * strength
        sigma = 3 * start / (1 + 2 * start)
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        noise = make_noise((16, 8, 12), make_generators([3]))
        expected = sigma * noise + (1 - sigma) * pipe.autoencoder.encode(pixels)
        assert len(seen) == SMALL["num_inference_steps"]
        torch.testing.assert_close(seen[0], pack(expected), atol=1e-5, rtol=0)

    def test_static_shift_starts_images_from_text_with_the_noise_alone(self, pipe: FluxImagePipeline) -> None:
        seen = self.first_tokens(pipe, sigma_shift=3.0)
        assert torch.equal(seen[0], pack(make_noise((16, 8, 12), make_generators([3]))))

    def test_cfg_scale_below_one_and_of_zero(self, pipe: FluxImagePipeline) -> None:
        """Any scale but 1 counts; 0 is the negative prompt alone."""
        common = {"seed": 8, "output_type": "latent", **SMALL}
        away = pipe("a cat", negative_prompt="a dog", cfg_scale=0.0, **common)
        torch.testing.assert_close(away, pipe("a dog", **common), atol=1e-5, rtol=0)
        between = pipe("a cat", negative_prompt="a dog", cfg_scale=0.5, **common)
        for other in (away, pipe("a cat", **common)):
            assert (between - other).abs().max() > 1e-3

    @pytest.mark.parametrize("tile_size", [16, 128])
    def test_tiles_that_hold_the_image_change_nothing(self, pipe: FluxImagePipeline, tile_size: int) -> None:
        tiles = {"tiled": True, "tile_size": tile_size, "tile_stride": 8}
        whole, tiled = (pipe("x", seed=1, output_type="pt", **SMALL, **options) for options in ({}, tiles))
        assert torch.equal(whole, tiled)

    def test_tiles_change_the_autoencoder_and_nothing_else(self, pipe: FluxImagePipeline) -> None:
        size = {"height": 160, "width": 208, "num_inference_steps": 2, "seed": 1}
        tiles = {"tiled": True, "tile_size": 16, "tile_stride": 12}
        assert torch.equal(pipe("x", output_type="latent", **size), pipe("x", output_type="latent", **size, **tiles))
        whole, tiled = (pipe("x", output_type="pt", **size, **options) for options in ({}, tiles))
        assert tiled.shape == whole.shape
        assert 0 < (tiled - whole).norm() / whole.norm() < 0.1

    def test_tiles_reach_the_encoder_in_pixels(self, pipe: FluxImagePipeline) -> None:
        common = {"input_image": noise_image(96, 64), "denoising_strength": 0.5, "output_type": "latent", "seed": 1}
        whole = pipe("x", **common, **SMALL)
        assert torch.equal(whole, pipe("x", tiled=True, tile_size=96, tile_stride=48, **common, **SMALL))
        tiled = pipe("x", tiled=True, tile_size=48, tile_stride=24, **common, **SMALL)
        assert 0 < (tiled - whole).norm() / whole.norm() < 0.5


class TestSampleOfDiffSynth:
    """The program on the model card: only the import differs."""

    def run(self, folder: Path, path: Path) -> bytes:
        model_manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu")
        model_manager.load_models(
            [
                str(folder / "text_encoder" / "model.safetensors"),
                str(folder / "text_encoder_2"),
                str(folder / "ae.safetensors"),
                str(folder / "flux1-tiny.safetensors"),
            ]
        )
        pipe = FluxImagePipeline.from_model_manager(model_manager)
        torch.manual_seed(6)
        image = pipe(prompt="a cat", num_inference_steps=30, embedded_guidance=3.5, height=32, width=32)
        image.save(path)
        return path.read_bytes()

    def test_runs_and_manual_seed_repeats_it(self, original_repository: Path, tmp_path: Path) -> None:
        with torch.random.fork_rng():
            first = self.run(original_repository, tmp_path / "1.png")
            assert self.run(original_repository, tmp_path / "2.png") == first
        with Image.open(tmp_path / "1.png") as image:
            assert image.size == (32, 32)

    def test_files_can_be_given_at_once_and_in_any_order(self, repository: Path, pipe: FluxImagePipeline) -> None:
        parts = [repository / name for name in ("vae", "transformer", "text_encoder_2", "text_encoder")]
        manager = ModelManager(torch.float32, "cpu", [list((repository / "vae").glob("*.safetensors")), *parts[1:]])
        again = FluxImagePipeline.from_model_manager(manager)
        common = {"seed": 1, "output_type": "latent", **SMALL}
        assert torch.equal(again("x", **common), pipe("x", **common))

    def test_parts_that_were_not_loaded_are_named(self, repository: Path) -> None:
        manager = ModelManager(torch.float32, "cpu", [repository / "vae", repository / "text_encoder"])
        with pytest.raises(CheckpointError, match="not loaded: transformer, T5 text encoder; add their files"):
            FluxImagePipeline.from_model_manager(manager)


SMALL_IMAGE = Image.new("RGB", (8, 8))


def embeds(num_texts: int, length: int, prefix: str = "") -> dict[str, Tensor]:
    """Return embeddings of zeros as arguments of a call."""
    return {
        f"{prefix}prompt_embeds": torch.zeros(num_texts, length, T5_WIDTH),
        f"{prefix}pooled_prompt_embeds": torch.zeros(num_texts, CLIP_WIDTH),
    }


BAD_CALLS: dict[str, tuple[dict[str, Any], str, str]] = {
    "size": ({"height": 1000}, "height", "height = 1000.* 992 and 1008"),
    "width": ({"width": 24}, "width", "width = 24.* 16 and 32"),
    "size 0": ({"width": 0}, "width", "from 16 to"),
    "fractional size": ({"width": 64.0}, "width", "whole number"),
    "NaN guidance": ({"embedded_guidance": float("nan")}, "embedded_guidance", "finite number"),
    "one NaN guidance": ({"embedded_guidance": [1.0, float("inf")]}, "embedded_guidance", "finite number"),
    "guidance as text": ({"guidance_scale": "3.5"}, "embedded_guidance", "finite number"),
    "negative cfg": ({"cfg_scale": -1.0}, "cfg_scale", "at least 0"),
    "negative steps": ({"num_inference_steps": -1}, "num_inference_steps", "from 1 to"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps", "from 1 to"),
    "True steps": ({"num_inference_steps": True}, "num_inference_steps", "whole number"),
    "list lengths": ({"seed": [1, 2, 3]}, "seed", "3 values for 2 prompts"),
    "empty list": ({"cfg_scale": []}, "cfg_scale", "0 values for 2 prompts"),
    "negative prompts": ({"negative_prompt": ["a"]}, "negative_prompt", "1 values for 2 prompts"),
    "negative prompt None": ({"negative_prompt": None}, "negative_prompt", "must be a string"),
    "prompt None": ({"prompt": None}, "prompt", "must be a string or a list"),
    "prompt of None": ({"prompt": ["a", None]}, "prompt", "must be a string or a list"),
    "negative seed": ({"seed": -1}, "seed", "from 0 to"),
    "seed as text": ({"seed": "1"}, "seed", "whole number"),
    "huge seed": ({"seed": 2**64}, "seed", "from 0 to"),
    "T5 length 0": ({"t5_sequence_length": 0}, "t5_sequence_length", "from 1 to"),
    "generator": (
        {"generator": torch.Generator()},
        "generator",
        "no argument of the pipeline: pass seed",
    ),
    "no such name": ({"guidence_scale": 1}, "guidence_scale", r"did you mean 'guidance_scale'\?"),
    "nearest name": ({"hight": 64}, "hight", r"did you mean 'height'\?"),
    "nothing near": ({"zzz": 64}, "zzz", "no argument of the pipeline; there are cfg_scale, "),
    "output type": ({"output_type": "jpeg"}, "output_type", "must be one of pil, np, pt, latent"),
    "strength 0": (
        {"input_image": Image.new("RGB", (8, 8)), "denoising_strength": 0.0},
        "denoising_strength",
        "more than 0",
    ),
    "no step left": (
        {"input_image": Image.new("RGB", (8, 8)), "denoising_strength": 1e-20},
        "denoising_strength",
        "leave",
    ),
    "strength 2": ({"denoising_strength": 2.0}, "denoising_strength", "at most 1"),
    "strength alone": ({"denoising_strength": 0.5}, "denoising_strength", "must be 1 without an input_image"),
    "stride": ({"tiled": True, "tile_stride": 129}, "tile_stride", "tile_stride = 129.* from 1 to 128"),
    "tile": ({"tiled": True, "tile_size": 8}, "tile_size", "tile_size = 8.* from 16 to"),
    "shift 0": ({"sigma_shift": 0.0}, "sigma_shift", "more than 0"),
    "image": ({"input_image": "cat.png"}, "input_image", "must be a PIL image"),
    "prompt and embeds": (embeds(2, 8), "prompt_embeds", "both given"),
    "embeds alone": (
        {"prompt": None, "prompt_embeds": torch.zeros(2, 8, T5_WIDTH)},
        "prompt",
        "prompt_embeds and pooled_prompt_embeds go together",
    ),
    "embeds that are no tensor": ({"prompt": None, **embeds(2, 8), "prompt_embeds": 3}, "prompt_embeds", "be a tensor"),
    "embeds of another width": (
        {"prompt": None, **embeds(2, 8), "prompt_embeds": torch.zeros(2, 8, 3)},
        "prompt_embeds",
        rf"is \[2, 8, 3\]: must be a tensor of shape \[2, 8, {T5_WIDTH}\]",
    ),
    "embeds of another length": (
        {"prompt": None, **embeds(2, 8), "t5_sequence_length": 16},
        "t5_sequence_length",
        "prompt_embeds have 8 tokens",
    ),
    "negative embeds of one more text": (
        embeds(3, 512, "negative_"),
        "negative_prompt_embeds",
        r"must be a tensor of shape \[2, ",
    ),
    "32 bits": ({"input_image": Image.new("F", (8, 8))}, "input_image", "32-bit samples"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_names_the_argument_and_what_would_be_right(pipe: FluxImagePipeline, name: str) -> None:
    options, field, message = BAD_CALLS[name]
    with pytest.raises(InvalidSetting, match=message) as caught:
        pipe(**{"prompt": ["a", "b"], **SMALL, **options})
    assert caught.value.field == field


class TestOutput:
    def test_a_text_in_a_image_out_a_list_in_a_list_out(self, pipe: FluxImagePipeline) -> None:
        one = pipe("x", seed=1, **SMALL)
        assert isinstance(one, Image.Image)
        assert one.size == (96, 64)
        (same,) = pipe(["x"], seed=[1], **SMALL)
        assert one.tobytes() == same.tobytes()
        assert pipe([], **SMALL) == []

    def test_np_is_the_bytes_of_pil(self, pipe: FluxImagePipeline) -> None:
        array = pipe("x", seed=1, output_type="np", **SMALL)
        assert array.dtype == np.uint8
        assert array.shape == (64, 96, 3)
        assert array.tobytes() == pipe("x", seed=1, **SMALL).tobytes()

    def test_pt_and_latent_keep_the_batch_axis(self, pipe: FluxImagePipeline) -> None:
        pixels = pipe("x", seed=1, output_type="pt", **SMALL)
        assert pixels.shape == (1, 3, 64, 96)
        assert pixels.dtype == torch.float32
        assert -1 <= pixels.min() < pixels.max() <= 1
        assert pipe("x", seed=1, output_type="latent", **SMALL).shape == (1, 16, 8, 12)
        assert pipe(PROMPTS, output_type="latent", **SMALL).shape == (3, 16, 8, 12)

    def test_progress_bar_wraps_the_steps(self, pipe: FluxImagePipeline) -> None:
        seen = []

        def bar(steps: Any) -> Iterator[int]:
            for step in steps:
                seen.append(step)
                yield step

        pipe("x", seed=1, progress_bar=bar, output_type="latent", **SMALL)
        assert seen == [0, 1, 2]


class TestTexts:
    def test_truncations_say_which_encoder_misses_the_end(self, pipe: FluxImagePipeline) -> None:
        texts = ["", "a" * 75, "a" * 76, "a" * 600]
        assert pipe.truncations(texts) == [(False, False), (False, False), (True, False), (True, True)]
        assert pipe.truncations(texts, 50) == [(False, False), (False, True), (True, True), (True, True)]
        assert pipe.truncations([]) == []

    def test_embeddings_stand_in_for_texts(self, pipe: FluxImagePipeline) -> None:
        prompts, negative_prompts = ["a cat", "two dogs"], ["bad", ""]
        options = {"seed": [1, 2], "cfg_scale": 2.0, "output_type": "latent", "height": 32, "width": 48}
        options["num_inference_steps"] = 2
        expected = pipe(prompts, negative_prompt=negative_prompts, t5_sequence_length=16, **options)
        prompt_embeds, pooled_prompt_embeds = pipe.encode_prompt(prompts, 16)
        assert prompt_embeds.shape == (2, 16, T5_WIDTH)
        assert pooled_prompt_embeds.shape == (2, CLIP_WIDTH)
        negative_prompt_embeds, negative_pooled_prompt_embeds = pipe.encode_prompt(negative_prompts, 16)
        images = pipe(
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            **options,
        )
        assert torch.equal(images, expected)

    def test_one_prompt_is_encoded_to_the_default_length(self, pipe: FluxImagePipeline) -> None:
        assert pipe.encode_prompt("x").prompt_embeds.shape == (1, pipe.default_t5_sequence_length, T5_WIDTH)

    @pytest.mark.parametrize(("prompt", "length"), [([], None), (None, None), (["a", 3], None), ("a", 0)])
    def test_what_cannot_be_encoded_is_refused(self, pipe: FluxImagePipeline, prompt: Any, length: int | None) -> None:
        with pytest.raises(InvalidSetting, match="must be"):
            pipe.encode_prompt(prompt, length)

    @pytest.mark.parametrize(
        ("texts", "cfg_scale", "titles"),
        [
            (("b " * 30, ""), 1.0, ["T5"]),
            (("b " * 100, ""), 1.0, ["CLIP", "T5"]),
            (("x", "b " * 100), 1.0, []),
            (("x", "b " * 100), 2.0, ["CLIP", "T5"]),
        ],
    )
    def test_what_is_left_out_is_warned_of(
        self, pipe: FluxImagePipeline, texts: tuple[str, str], cfg_scale: float, titles: list[str]
    ) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe(texts[0], texts[1], cfg_scale=cfg_scale, t5_sequence_length=20, output_type="latent", **SMALL)
        assert [str(warning.message).split(" reads")[0].split()[-1] for warning in caught] == titles
        assert all(warning.filename == __file__ for warning in caught)

    @pytest.mark.parametrize(
        ("guidance_embed", "t5_max_length", "expected"),
        [(True, 512, 512), (False, 512, 256), (True, 96, 96), (False, 96, 96)],
    )
    def test_default_t5_length_is_that_of_the_model(
        self, tmp_path: Path, guidance_embed: bool, t5_max_length: int, expected: int
    ) -> None:
        config = TinyFlux(depth=1, depth_single_blocks=1, guidance_embed=guidance_embed, t5_max_length=t5_max_length)
        pipe = FluxImagePipeline.from_pretrained(make_tiny_repository(tmp_path / "model", config), **CPU)
        assert pipe.default_t5_sequence_length == expected
        common = {"seed": 1, "output_type": "latent", "height": 16, "width": 16, "num_inference_steps": 1}
        assert torch.equal(pipe("x", **common), pipe("x", t5_sequence_length=expected, **common))


class TestFromPretrained:
    def test_takes_a_file_address(self, repository: Path, pipe: FluxImagePipeline) -> None:
        again = FluxImagePipeline.from_pretrained(repository.as_uri(), **CPU)
        assert again.transformer.params == pipe.transformer.params

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no model folder .*not-there: `flux-batch download"):
            FluxImagePipeline.from_pretrained(tmp_path / "not-there", **CPU)

    def test_file_of_one_part_instead_of_folder(self, original_repository: Path) -> None:
        with pytest.raises(CheckpointError, match=r"ae\.safetensors holds no transformer and no .*: put it into a"):
            FluxImagePipeline.from_pretrained(original_repository / "ae.safetensors", **CPU)

    @pytest.mark.parametrize(
        ("sub_folder", "title"),
        [
            ("transformer", "transformer"),
            ("vae", "autoencoder"),
            ("text_encoder", "CLIP text encoder"),
            ("text_encoder_2", "T5 text encoder"),
        ],
    )
    def test_missing_part(self, repository: Path, tmp_path: Path, sub_folder: str, title: str) -> None:
        folder = copy_repository(repository, tmp_path / "model")
        for path in (folder / sub_folder).glob("*.safetensors"):
            path.unlink()
        with pytest.raises(CheckpointError, match=rf"no {title}: looked for .*{sub_folder}.*safetensors") as caught:
            FluxImagePipeline.from_pretrained(folder, **CPU)
        assert str(folder) in str(caught.value)

    def test_missing_tokenizer(self, repository: Path, tmp_path: Path) -> None:
        folder = copy_repository(repository, tmp_path / "model")
        (folder / "tokenizer_2" / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match=r"tokenizer_2 is no tokenizer: it lacks tokenizer\.json or spiece"):
            FluxImagePipeline.from_pretrained(folder, **CPU)

    def test_damaged_tokenizer(self, repository: Path, tmp_path: Path) -> None:
        folder = copy_repository(repository, tmp_path / "model")
        (folder / "tokenizer" / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match="holds a tokenizer that cannot be read"):
            FluxImagePipeline.from_pretrained(folder, **CPU)

    def test_two_files_for_one_part(self, original_repository: Path, tmp_path: Path) -> None:
        folder = copy_repository(original_repository, tmp_path / "model")
        (folder / "flux2.safetensors").write_bytes((folder / "flux1-tiny.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match=r"several files for the transformer: flux1-tiny.*, flux2"):
            FluxImagePipeline.from_pretrained(folder, **CPU)

    def test_parts_of_two_models(self, repository: Path, tmp_path: Path) -> None:
        folder = copy_repository(repository, tmp_path / "model")
        for name in ("config.json", "model.safetensors"):
            (folder / "text_encoder_2" / name).unlink()
        wide = TinyFlux(depth=1, depth_single_blocks=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny_flux, "T5_WIDTH", 40)
            other = make_tiny_repository(tmp_path / "other", wide)
        for name in ("config.json", "model.safetensors"):
            (other / "text_encoder_2" / name).rename(folder / "text_encoder_2" / name)
        with pytest.raises(CheckpointError, match=r"not of one model: width of the T5 text encoder is 40, .* takes 24"):
            FluxImagePipeline.from_pretrained(folder, **CPU)

    @pytest.mark.parametrize("dtype", ["bfloat17", "int8", "Tensor", torch.int64])
    def test_unknown_dtype(self, repository: Path, dtype: Any) -> None:
        with pytest.raises(InvalidSetting, match="must be bfloat16, float16, float32 or auto"):
            FluxImagePipeline.from_pretrained(repository, torch_dtype=dtype, device="cpu")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_no_cuda(self, repository: Path) -> None:
        with pytest.raises(InvalidSetting, match="there is no CUDA device here; use cpu"):
            FluxImagePipeline.from_pretrained(repository, device="cuda")

    def test_cuda_graphs_on_no_cuda_device(self, repository: Path) -> None:
        message = "^cuda_graphs = True: CUDA graphs need a CUDA device, and the transformer is on cpu$"
        with pytest.raises(InvalidSetting, match=message) as caught:
            FluxImagePipeline.from_pretrained(repository, cuda_graphs=True, **CPU)
        assert caught.value.field == "cuda_graphs"

    def test_cuda_graphs_beside_a_step_cache(self, repository: Path, pipe: FluxImagePipeline) -> None:
        for refused in (
            lambda: FluxImagePipeline.from_pretrained(repository, cuda_graphs=True, step_cache=0.1, **CPU),
            lambda: with_graphs(pipe, GraphRecorder())("x", step_cache=0.1, **SMALL),
        ):
            with pytest.raises(InvalidSetting, match=r"leave it out, or set step_cache = 0\.1 to 0$"):
                refused()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OutOfMemory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), OutOfMemory),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceFatal),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
    ],
)
def test_what_a_device_raises_becomes_ours(error: RuntimeError, expected: type[Exception]) -> None:
    with pytest.raises(expected) as caught, device_errors():
        raise error
    assert type(caught.value) is expected


def test_a_image_that_overflowed_is_an_error_and_not_black(repository: Path) -> None:
    broken = FluxImagePipeline.from_pretrained(repository, **CPU)
    broken.autoencoder.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(RowError, match="overflowed in float32"):
        broken("x", seed=0, **SMALL)


def test_numbers_of_numpy_are_numbers(pipe: FluxImagePipeline) -> None:
    size = {name: np.int64(value) for name, value in SMALL.items()}
    arrays = [pipe("x", seed=seed, output_type="np", **kind) for seed, kind in ((7, SMALL), (np.int64(7), size))]
    assert np.array_equal(*arrays)
