"""The pipeline compared with diffusers, with the same weights, prompts and seeds."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from PIL import Image

from flux_batch import FluxImagePipeline
from flux_batch.model.sampling import make_generators, make_noise
from flux_batch.prompts.input_images import decode
from helpers.parity import as_reference_arguments, assert_same, load_reference
from helpers.tiny_calls import CPU, PROMPTS, SEEDS, SMALL, noise_image
from helpers.tiny_flux import TinyFlux, copy_repository, make_tiny_repository

CONFIGS = {
    "dev": TinyFlux(t5_max_length=512),
    "schnell": TinyFlux(guidance_embed=False, dynamic_shift=False, t5_max_length=256),
    "heads of 128": TinyFlux(axes_dim=(16, 56, 56), num_heads=1, depth=1, depth_single_blocks=1),
    "1 and 5 blocks": TinyFlux(num_heads=3, depth=1, depth_single_blocks=5, seed=3),
    "4 and 1 blocks": TinyFlux(axes_dim=(2, 4, 2), num_heads=5, depth=4, depth_single_blocks=1, seed=4),
}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each configuration, in diffusers' layout."""
    folder = tmp_path_factory.mktemp("models")
    return {name: make_tiny_repository(folder / name, config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def reference(repository: Path) -> FluxPipeline:
    return load_reference(repository)


@pytest.fixture(scope="module")
def img2img(repository: Path) -> FluxImg2ImgPipeline:
    return load_reference(repository, FluxImg2ImgPipeline)


class TestParity:
    """Direct comparison with diffusers; every image has its own CPU generator."""

    @pytest.mark.parametrize("name", CONFIGS)
    def test_every_configuration(self, repositories: dict[str, Path], name: str) -> None:
        pipe = FluxImagePipeline.from_pretrained(repositories[name], **CPU)
        length = CONFIGS[name].t5_max_length
        assert pipe.default_t5_sequence_length == length
        theirs = {"max_sequence_length": length, "guidance_scale": 3.5}
        assert_same(pipe, load_reference(repositories[name]), theirs=theirs)

    def test_original_layout(self, original_repository: Path, reference: FluxPipeline) -> None:
        pipe = FluxImagePipeline.from_pretrained(original_repository, **CPU)
        assert_same(pipe, reference, theirs={"guidance_scale": 3.5})

    @pytest.mark.parametrize("scale", [1.0, 3.7])
    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_bfloat16_is_rounded_in_the_same_places(self, repository: Path, prompt: str, scale: float) -> None:
        """One image at a time: diffusers encodes the texts of a batch together, with different rounding."""
        reference = load_reference(repository, dtype=torch.bfloat16)
        ours = FluxImagePipeline.from_pretrained(repository, torch_dtype="bfloat16", device="cpu")
        same = {"negative_prompt": "blurry", "true_cfg_scale": scale, "max_sequence_length": 64}
        same |= {"height": 64, "width": 96, "num_inference_steps": 4}
        (expected,) = reference(**as_reference_arguments([prompt], [7], output_type="pil", **same)).images
        assert np.array_equal(np.asarray(ours(prompt, seed=7, **same)), np.asarray(expected))

    def test_sharded_transformer(self, tmp_path: Path, reference: FluxPipeline) -> None:
        folder = make_tiny_repository(tmp_path / "sharded", max_shard_size="100KB")
        assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
        pipe = FluxImagePipeline.from_pretrained(folder, **CPU)
        assert_same(pipe, reference, prompts=PROMPTS[:1], seeds=[5])

    @pytest.mark.parametrize(("height", "width"), [(16, 16), (128, 128), (208, 48), (16, 272)])
    def test_sizes(self, pipe: FluxImagePipeline, reference: FluxPipeline, height: int, width: int) -> None:
        assert_same(pipe, reference, height=height, width=width, num_inference_steps=2)

    @pytest.mark.parametrize("guidance", [0.0, 1.0, 3.5, 10.0])
    def test_embedded_guidance(self, pipe: FluxImagePipeline, reference: FluxPipeline, guidance: float) -> None:
        ours, theirs = {"embedded_guidance": guidance}, {"guidance_scale": guidance}
        assert_same(pipe, reference, ours=ours, theirs=theirs, num_inference_steps=2, decoded=False)

    def test_embedded_guidance_changes_the_image(self, pipe: FluxImagePipeline) -> None:
        low, high = pipe(["x", "x"], seed=1, embedded_guidance=[1.0, 10.0], output_type="latent", **SMALL)
        assert (low - high).abs().max() > 1e-2

    @pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
    def test_true_cfg(self, pipe: FluxImagePipeline, reference: FluxPipeline, scale: float) -> None:
        negative = ["blurry", "", "a cat"]
        ours = {"negative_prompt": negative, "cfg_scale": scale}
        theirs = {"negative_prompt": negative, "true_cfg_scale": scale}
        assert_same(pipe, reference, ours=ours, theirs=theirs, decoded=False)

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
            decoded=False,
        )

    @pytest.mark.filterwarnings("ignore:a prompt is longer than T5 reads")
    @pytest.mark.parametrize("length", [1, 256, 512])
    def test_t5_lengths(self, pipe: FluxImagePipeline, reference: FluxPipeline, length: int) -> None:
        ours, theirs = {"t5_sequence_length": length}, {"max_sequence_length": length}
        assert_same(pipe, reference, ours=ours, theirs=theirs, num_inference_steps=2, decoded=False)

    def test_prompts_longer_than_the_text_encoders_read(self, pipe: FluxImagePipeline, reference: FluxPipeline) -> None:
        prompts = ["a long prompt " * 60, "b " * 300]
        assert pipe.truncations(prompts) == [(True, True)] * 2
        with pytest.warns(UserWarning, match="longer than (CLIP|T5) reads, its end is left out"):
            assert_same(pipe, reference, prompts=prompts, seeds=[1, 2], num_inference_steps=2)

    def test_spellings_of_diffusers(self, pipe: FluxImagePipeline, reference: FluxPipeline) -> None:
        same = {"guidance_scale": 2.0, "true_cfg_scale": 3.0, "max_sequence_length": 40, "negative_prompt": "no"}
        theirs = {**same, "negative_prompt": ["no"] * 3}
        assert_same(pipe, reference, ours=same, theirs=theirs, num_inference_steps=2, decoded=False)

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
        pipe = FluxImagePipeline.from_pretrained(folder, **CPU)
        assert_same(pipe, load_reference(folder), num_inference_steps=4, decoded=False)

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
            decoded=False,
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
        """diffusers accepts no alpha, and its load_image shows the pixels under it."""
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
