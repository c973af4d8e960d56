from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from flux_batch.demo.paths import demo_lora_path, demo_model_folder
from flux_batch.demo.world.captions import captions
from flux_batch.demo.world.drawing import draw
from flux_batch.pipeline.pipeline import FluxImagePipeline

FOLDER = demo_model_folder()
PROMPT = "a small red star left of a large blue circle on a plain white background"


@pytest.fixture(scope="module")
def pipeline() -> FluxImagePipeline:
    return FluxImagePipeline.from_pretrained("demo", torch_dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def peer() -> Any:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.FluxPipeline.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_files_are_those_of_a_flux_repository_and_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]

    assert {path.name for path in FOLDER.iterdir()} == {
        "model_index.json",
        "scheduler",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "transformer",
        "vae",
    }
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    assert demo_lora_path("blueprint").stat().st_size < 300_000
    assert all(demo_lora_path(f"flux-{name}").stat().st_size < 1_500_000 for name in ("canny", "kontext"))


def test_weights_are_bfloat16_under_the_names_of_the_real_files() -> None:
    clip = tensors(FOLDER / "text_encoder" / "model.safetensors")
    t5 = tensors(FOLDER / "text_encoder_2" / "model.safetensors")
    transformer = tensors(FOLDER / "transformer" / "diffusion_pytorch_model.safetensors")
    vae = tensors(FOLDER / "vae" / "diffusion_pytorch_model.safetensors")

    assert all(name.startswith("text_model.") for name in clip)
    assert "shared.weight" in t5
    assert "encoder.embed_tokens.weight" not in t5
    assert "time_text_embed.guidance_embedder.linear_1.weight" in transformer
    assert {dtype for part in (clip, t5, transformer, vae) for dtype in part.values()} == {"BF16"}


def test_vocabularies_fit_the_text_encoders() -> None:
    vocabulary = json.loads((FOLDER / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert setting("text_encoder", "vocab_size") == len(vocabulary)
    tokenizer = json.loads((FOLDER / "tokenizer_2" / "tokenizer.json").read_text(encoding="utf-8"))
    assert setting("text_encoder_2", "vocab_size") == len(tokenizer["model"]["vocab"])


def test_sizes_and_constants_are_those_of_flux_but_for_width_and_depth() -> None:
    assert setting("transformer", "attention_head_dim") == 128
    assert setting("transformer", "axes_dims_rope") == [16, 56, 56]
    assert (setting("vae", "scaling_factor"), setting("vae", "shift_factor")) == (0.3611, 0.1159)
    assert setting("vae", "latent_channels") == 16


def test_latents_have_no_mean_and_unit_variance(pipeline: FluxImagePipeline) -> None:
    import random

    rng = random.Random(0)
    images = [np.asarray(draw(caption.scene, 128, 128, rng)) for caption in captions(24, seed=1)]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        latents = pipeline.autoencoder.encode(pixels)
        back = pipeline.autoencoder.decode(latents)

    assert abs(latents.mean()) < 0.1
    assert abs(latents.std() - 1) < 0.1
    # 6 of 255 levels.
    assert (back - pixels).abs().mean() * 127.5 < 6


# A CPU without bfloat16 takes 58 times as long for a convolution in it.
@pytest.mark.parametrize(("dtype", "side"), [(torch.float32, 128), (torch.bfloat16, 64)])
def test_images_are_neither_flat_nor_broken(dtype: torch.dtype, side: int) -> None:
    pipe = FluxImagePipeline.from_pretrained("demo", torch_dtype=dtype, device="cpu")

    pixels = pipe(
        prompt=PROMPT, height=side, width=side, num_inference_steps=8, seed=0, t5_sequence_length=64, output_type="pt"
    )

    assert pixels.isfinite().all()
    assert pixels.std(dim=(2, 3)).min() > 0.1


def test_images_depend_on_prompt_and_seed(pipeline: FluxImagePipeline) -> None:
    def image(prompt: str, seed: int) -> Any:
        size: dict[str, Any] = {"height": 128, "width": 128, "num_inference_steps": 4, "t5_sequence_length": 48}
        return pipeline(prompt=prompt, seed=seed, output_type="np", **size).astype(float)

    first = image(PROMPT, 0)

    assert np.abs(first - image(PROMPT, 0)).max() == 0
    assert np.abs(first - image("a huge black heart at the top on a pink background", 0)).mean() > 20
    assert np.abs(first - image(PROMPT, 1)).mean() > 0


@pytest.mark.parametrize(("width", "height", "cfg_scale"), [(128, 128, 2.5), (192, 128, 1.0)])
def test_diffusers_makes_the_same_image(
    pipeline: FluxImagePipeline, peer: Any, width: int, height: int, cfg_scale: float
) -> None:
    same: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": "a big yellow ring",
        "width": width,
        "height": height,
        "num_inference_steps": 6,
        "true_cfg_scale": cfg_scale,
        "max_sequence_length": 64,
    }

    ours = pipeline(**same, seed=5)
    (theirs,) = peer(**same, guidance_scale=3.5, generator=torch.Generator().manual_seed(5)).images

    assert largest_difference(ours, theirs) <= 1


def test_diffusers_makes_the_same_image_with_default_settings(pipeline: FluxImagePipeline, peer: Any) -> None:
    same: dict[str, Any] = {"prompt": PROMPT, "width": 128, "height": 128, "num_inference_steps": 4}

    (theirs,) = peer(**same, generator=torch.Generator().manual_seed(5)).images

    assert largest_difference(pipeline(**same, seed=5), theirs) <= 1


def test_the_original_layout_gives_the_same_images(pipeline: FluxImagePipeline, tmp_path: Path) -> None:
    write_original(tmp_path)
    original = FluxImagePipeline.from_pretrained(str(tmp_path), torch_dtype=torch.float32, device="cpu")
    settings: dict[str, Any] = {"width": 128, "height": 128, "num_inference_steps": 3, "t5_sequence_length": 48}

    images = [pipe(prompt=PROMPT, seed=2, output_type="np", **settings) for pipe in (pipeline, original)]

    assert np.array_equal(*images)


def write_original(folder: Path) -> None:
    """Write the demo model in the original layout: two single files, and folders of encoders and tokenizers."""
    from safetensors.torch import load_file, save_file

    from flux_batch.model.checkpoint import diffusers_keys

    transformer = load_file(FOLDER / "transformer" / "diffusion_pytorch_model.safetensors")
    vae = load_file(FOLDER / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(diffusers_keys.transformer_from_diffusers(transformer), folder / "flux1-demo.safetensors")
    save_file(diffusers_keys.autoencoder_from_diffusers(vae), folder / "ae.safetensors")
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(FOLDER / part, folder / part)


def setting(part: str, name: str) -> Any:
    return json.loads((FOLDER / part / "config.json").read_text())[name]


def tensors(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)


def largest_difference(ours: Any, theirs: Any) -> int:
    return int(np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max())
