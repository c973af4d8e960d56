"""DiffSynth-Studio's schedule, its tiles, and the sample of its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flux_batch import FluxImagePipeline, ModelManager
from flux_batch.errors import CheckpointError
from flux_batch.model.sampling import make_generators, make_noise, pack
from helpers.tiny_calls import SMALL, noise_image


class TestWaysOfDiffSynth:
    def first_tokens(self, pipe: FluxImagePipeline, **options: Any) -> list[Tensor]:
        """Return the input of the transformer at each step."""
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
        """Source: DiffSynth-Studio fed7b18, FlowMatchScheduler.set_timesteps_flux, FluxImageUnit_InputImageEmbedder."""
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
        """Any scale except 1 has an effect; 0 is the negative prompt alone."""
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
    """The program of the model card, with only its import changed."""

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
