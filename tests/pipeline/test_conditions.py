"""Fill, inpainting, Canny and Depth compared with diffusers, and the errors of calls without images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlPipeline,
    FluxFillPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
)
from PIL import Image

from flux_batch import FluxImagePipeline
from flux_batch.errors import InvalidSetting
from flux_batch.model.optimize.cuda_graphs import CudaGraphs
from flux_batch.pipeline.images.inputs import image_inputs
from helpers.graph_recorder import GraphRecorder
from helpers.parity import assert_same, load_reference
from helpers.tiny_calls import CPU, PROMPTS, SEEDS, SMALL, noise_image
from helpers.tiny_flux import TinyFlux, make_tiny_repository


def mask(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """Return a mask that repaints a box."""
    image = Image.new("L", (width, height))
    image.paste(255, box)
    return image


IMAGES = [noise_image(96, 64), noise_image(96, 64).rotate(180), noise_image(48, 32)]
MASKS = [mask(96, 64, (10, 5, 60, 41)), mask(96, 64, (0, 0, 96, 64)), mask(48, 32, (8, 8, 16, 32))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A model for each number of token channels."""
    folder = tmp_path_factory.mktemp("conditions")
    models = {384: "flux-fill", 128: "flux-depth"}
    return {
        channels: make_tiny_repository(folder / name, TinyFlux(in_channels=channels, num_heads=3))
        for channels, name in models.items()
    }


def load_mean(folder: Path, kind: type) -> Any:
    """Load a diffusers pipeline whose posteriors have zero variance, so that samples are means."""
    reference = load_reference(folder, kind)
    conv = reference.vae.encoder.conv_out
    with torch.no_grad():
        conv.weight[16:], conv.bias[16:] = 0, -60.0
    return reference


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (32, 48)])
def test_fill(folders: dict[int, Path], strength: float, height: int, width: int) -> None:
    pipe = FluxImagePipeline.from_pretrained(folders[384], **CPU)
    with torch.no_grad():
        pipe.autoencoder.encoder.conv_out.weight[16:], pipe.autoencoder.encoder.conv_out.bias[16:] = 0, -60.0
    assert_same(
        pipe,
        load_mean(folders[384], FluxFillPipeline),
        height=height,
        width=width,
        num_inference_steps=5,
        ours={"image": IMAGES, "mask_image": MASKS, "strength": strength, "paste_back": False},
        theirs={"image": IMAGES, "mask_image": MASKS, "strength": strength},
    )


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_by_a_model_of_text_to_image(pipe: FluxImagePipeline, repository: Path, strength: float) -> None:
    assert_same(
        pipe,
        load_reference(repository, FluxInpaintPipeline),
        num_inference_steps=5,
        ours={"image": [*IMAGES[:2], IMAGES[0]], "mask_image": [*MASKS[:2], MASKS[0]], "strength": strength}
        | {"paste_back": False},
        theirs={"image": [*IMAGES[:2], IMAGES[0]], "mask_image": [*MASKS[:2], MASKS[0]], "strength": strength}
        | {"guidance_scale": 3.5},
    )


def test_canny_and_depth(folders: dict[int, Path]) -> None:
    pipe = FluxImagePipeline.from_pretrained(folders[128], **CPU)
    reference = load_mean(folders[128], FluxControlPipeline)
    with torch.inference_mode():
        seeds = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
        noise = torch.cat([torch.randn((1, 16, 8, 12), generator=seed) for seed in seeds])
    theirs = {"control_image": IMAGES, "latents": reference._pack_latents(noise, 3, 16, 8, 12)}
    # The name of its folder says Depth, whose guidance is 10.
    assert pipe.default_guidance == 10.0
    assert_same(pipe, reference, ours={"control_image": IMAGES}, theirs=theirs | {"guidance_scale": 10.0})


@pytest.fixture(scope="module")
def kontext(repository: Path) -> FluxImagePipeline:
    return FluxImagePipeline.from_pretrained(repository, variant="kontext", **CPU)


@pytest.mark.parametrize(
    ("height", "width", "reference", "scale"),
    [(64, 96, (96, 64), 1.0), (48, 32, (64, 80), 2.0), (32, 32, (70, 50), 1.0)],
)
def test_kontext(
    kontext: FluxImagePipeline, repository: Path, height: int, width: int, reference: tuple[int, int], scale: float
) -> None:
    image = noise_image(*reference)
    theirs = {"image": image, "max_area": height * width, "_auto_resize": False, "guidance_scale": 2.5}
    ours = {"image": [image], "resize_references": False}
    if scale != 1:
        ours |= {"negative_prompt": "blurry", "cfg_scale": scale}
        theirs |= {"negative_prompt": ["blurry"] * 3, "true_cfg_scale": scale}
    peer = load_reference(repository, FluxKontextPipeline)
    assert_same(kontext, peer, height=height, width=width, ours=ours, theirs=theirs)


@pytest.mark.parametrize("reference", [None, noise_image(70, 50)])
def test_inpainting_by_a_kontext(kontext: FluxImagePipeline, repository: Path, reference: Image.Image | None) -> None:
    words: dict[str, Any] = {"image": IMAGES[0], "mask_image": MASKS[0], "image_reference": reference, "strength": 0.6}
    peer = load_reference(repository, FluxKontextInpaintPipeline)
    theirs = words | {"_auto_resize": False, "guidance_scale": 2.5}
    ours = words | {"resize_references": False, "paste_back": False}
    assert_same(kontext, peer, num_inference_steps=5, ours=ours, theirs=theirs, decoded=False)


def test_kontext_without_a_reference_is_text_to_image(kontext: FluxImagePipeline, pipe: FluxImagePipeline) -> None:
    common = {"seed": 3, "output_type": "latent", **SMALL}
    assert torch.equal(kontext("x", **common), pipe("x", guidance_scale=2.5, **common))


def test_a_reference_in_two_words_is_refused_and_one_that_is_none_is_no_word(kontext: FluxImagePipeline) -> None:
    common = {"num_inference_steps": 1, "seed": 1, "output_type": "latent"}
    one, other = noise_image(48, 48), noise_image(48, 32)
    with pytest.raises(InvalidSetting, match="image: reference_image is given twice"):
        kontext("x", image=one, reference_image=other, **common)
    expected = kontext("x", reference_image=other, **common)
    assert torch.equal(kontext("x", image=None, reference_image=other, **common), expected)


def test_references_give_the_size_and_are_brought_to_one_that_kontext_knows(kontext: FluxImagePipeline) -> None:
    common: dict[str, Any] = {"seed": 3, "num_inference_steps": 1, "t5_sequence_length": 8}
    image = kontext("x", kontext_images=noise_image(50, 70), resize_references=False, **common)
    assert image.size == (48, 64)
    several = [noise_image(32, 48), noise_image(48, 16)]
    image = kontext("x", reference_image=several, resize_references=False, width=80, **common)
    assert image.size == (80, 48)
    for size, preferred in {(1920, 1080): (1392, 752), (512, 512): (1024, 1024), (640, 480): (1184, 880)}.items():
        assert image_inputs(1, {"reference_image": noise_image(*size)}).reference_sizes == (preferred,)


def test_the_order_of_references_and_each_of_them_counts(kontext: FluxImagePipeline) -> None:
    common = {"seed": 3, "output_type": "latent", "resize_references": False, **SMALL}
    one, other = noise_image(32, 48), noise_image(48, 16).rotate(180)
    made = [kontext("x", reference_image=each, **common) for each in ([one, other], [other, one], [one], [one, one])]
    assert all((made[0] - each).abs().max() > 1e-3 for each in made[1:])


@pytest.mark.parametrize("speed_up", ["step cache", "graphs", "tiled", "bfloat16"])
def test_speed_ups_hold_with_references_and_channels(repository: Path, folders: dict[int, Path], speed_up: str) -> None:
    """A cache that reuses nothing, graphs, and tiles that hold the whole image change no bit."""
    options: dict[str, Any] = {
        "step cache": {"step_cache": 1e-9},
        "tiled": {"tiled": True, "tile_size": 128},
    }.get(speed_up, {})
    given: dict[int, dict[str, Any]] = {
        384: {"image": IMAGES[0], "mask_image": MASKS[0]},
        64: {"reference_image": IMAGES[0]},
    }
    for channels, images in given.items():
        folder = repository if channels == 64 else folders[channels]
        narrow: Any = {"quantization": "bfloat16"} if speed_up == "bfloat16" else {}
        variant: Any = "kontext" if channels == 64 else "auto"
        model = FluxImagePipeline.from_pretrained(folder, variant=variant, **CPU)
        fast = FluxImagePipeline.from_pretrained(folder, variant=variant, **narrow, **CPU)
        if speed_up == "graphs":
            fast.graphs = CudaGraphs(fast.transformer, GraphRecorder())
        common: dict[str, Any] = {"seed": 1, "output_type": "latent", "resize_references": False, **images, **SMALL}
        expected = model("x", **common)
        torch.testing.assert_close(fast("x", **options, **common), expected, atol=0.3 if narrow else 1e-6, rtol=0)


@pytest.mark.parametrize("channels", [64, 384])
def test_what_a_mask_leaves_is_that_of_the_image_bit_for_bit(
    pipe: FluxImagePipeline, folders: dict[int, Path], channels: int
) -> None:
    model = pipe if channels == 64 else FluxImagePipeline.from_pretrained(folders[channels], **CPU)
    made = model(PROMPTS, image=IMAGES[0], mask_image=MASKS[0], seed=SEEDS, output_type="np", **SMALL)
    repainted = np.asarray(MASKS[0]) > 127
    for image in made:
        same = (image == np.asarray(IMAGES[0])).all(axis=2)
        assert same[~repainted].all()
        assert not same[repainted].all()
    empty = model("x", image=IMAGES[0], mask_image=Image.new("1", (96, 64)), seed=1, output_type="np", **SMALL)
    assert np.array_equal(empty, np.asarray(IMAGES[0]))


def test_an_image_does_not_depend_on_its_neighbours(folders: dict[int, Path]) -> None:
    pipe = FluxImagePipeline.from_pretrained(folders[384], **CPU)
    masks = [MASKS[0], MASKS[1], mask(96, 64, (8, 8, 16, 32))]
    together = pipe(PROMPTS, image=IMAGES, mask_image=masks, seed=SEEDS, output_type="np", **SMALL)
    for at in range(3):
        alone = pipe(PROMPTS[at], image=IMAGES[at], mask_image=masks[at], seed=SEEDS[at], output_type="np", **SMALL)
        assert np.abs(together[at].astype(int) - alone.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("channels", "images", "message"),
    [
        (384, {"input_image": IMAGES[0]}, "mask_image is missing: FLUX.1-Fill needs input_image and mask_image"),
        (64, {"mask_image": MASKS[0]}, "mask_image: needs an input_image to repaint"),
        (64, {"control_image": IMAGES[0]}, "control_image: FLUX.1 reads none; leave it out"),
        (64, {"reference_image": IMAGES[0]}, "reference_image: FLUX.1 reads none; leave it out"),
        (64, {"reference_image": "a.png"}, "reference_image is a str: must be a PIL image"),
        (128, {}, "control_image is missing: FLUX.1-Depth needs control_image"),
        (128, {"control_image": [IMAGES[:2]]}, "control_image: 2 images, where FLUX.1-Depth reads one"),
        (64, {"input_image": IMAGES[0], "mask_image": Image.new("L", (64, 64))}, "64 x 64 pixels, its image 96 x 64"),
    ],
)
def test_images_that_a_model_lacks_or_cannot_use_are_named(
    pipe: FluxImagePipeline, folders: dict[int, Path], channels: int, images: dict[str, Any], message: str
) -> None:
    model = pipe if channels == 64 else FluxImagePipeline.from_pretrained(folders[channels], **CPU)
    with pytest.raises(InvalidSetting, match=message):
        model(["x"], **images, **SMALL)
