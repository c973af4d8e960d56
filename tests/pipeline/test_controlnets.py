"""ControlNets compared with diffusers: kinds, numbers of nets and blocks, and the errors of calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import save_file

from flux_batch import FluxImagePipeline, ModelManager
from flux_batch.config.schema import ModelConfig
from flux_batch.errors import CheckpointError, InvalidSetting
from flux_batch.model.checkpoint.diffusers_keys import controlnet_from_diffusers
from flux_batch.model.sampling import pack
from flux_batch.pipeline.images.controls import ControlNets
from flux_batch.pipeline.images.pixels import to_pixels
from flux_batch.pipeline.load import check_weights, load_pipeline
from helpers.parity import assert_same
from helpers.tiny_calls import CPU, PROMPTS, SEEDS, SMALL, noise_image
from helpers.tiny_controlnet import BASE, make_net, reference_of
from helpers.tiny_flux import TinyFlux, make_tiny_repository, read_folder

# A deprecation warning of diffusers about its own class.
pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")
IMAGES = [noise_image(96, 64), noise_image(96, 64).rotate(180), noise_image(48, 32)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_repository(tmp_path_factory.mktemp("models") / "dev", BASE)


def with_latents(reference: Any, height: int, width: int, **arguments: Any) -> dict[str, Any]:
    """Return diffusers' arguments with our noise, since it draws the noise of the posterior first."""
    noise = [
        torch.randn((1, 16, height // 8, width // 8), generator=torch.Generator().manual_seed(seed)) for seed in SEEDS
    ]
    latents = reference._pack_latents(torch.cat(noise), len(SEEDS), 16, height // 8, width // 8)
    return {"guidance_scale": 3.5, "latents": latents, **arguments}


@pytest.mark.parametrize(
    ("depth", "depth_single", "mode", "height", "width"),
    [(2, 2, None, 64, 96), (1, 0, None, 32, 48), (2, 1, 4, 48, 32), (3, 5, None, 64, 96)],
)
def test_a_net_and_its_settings(
    base: Path, tmp_path: Path, depth: int, depth_single: int, mode: int | None, height: int, width: int
) -> None:
    net = make_net(tmp_path / "net", depth, depth_single, 10 if mode else None)
    reference = reference_of(base, net)
    settings = {"controlnet_conditioning_scale": 0.6, "control_guidance_start": 0.2, "control_guidance_end": 0.8}
    assert_same(
        FluxImagePipeline.from_pretrained(base, controlnets=[net], **CPU),
        reference,
        height=height,
        width=width,
        num_inference_steps=5,
        ours={"control_image": IMAGES, "control_mode": mode, **settings},
        theirs=with_latents(reference, height, width, control_image=IMAGES, **settings) | {"control_mode": mode},
    )


def test_nets_of_other_numbers_of_blocks_add_up_whatever_their_order(base: Path, tmp_path: Path) -> None:
    sizes = {"1/0": (1, 0, None), "1/2": (1, 2, 10), "3/5": (3, 5, None)}
    nets = [make_net(tmp_path / name[0] / name[2], *size) for name, size in sizes.items()]
    settings: dict[str, Any] = {
        "controlnet_conditioning_scale": [0.6, 1.1, 0.4],
        "control_guidance_start": [0.0, 0.4, 0.0],
        "control_guidance_end": [0.8, 1.0, 1.0],
        "control_mode": [None, 7, None],
    }
    pipe = FluxImagePipeline.from_pretrained(base, controlnets=nets, **CPU)
    reference = reference_of(base, *nets)
    by_net = [IMAGES, IMAGES[::-1], [IMAGES[1]] * 3]
    by_image = [list(images) for images in zip(*by_net, strict=True)]
    assert_same(
        pipe,
        reference,
        num_inference_steps=5,
        ours={"control_image": by_image, **settings},
        theirs=with_latents(reference, 64, 96, control_image=by_net, **settings),
    )
    common = {"seed": 3, "output_type": "latent", **SMALL}
    expected = pipe(PROMPTS[0], control_image=by_image[0], **settings, **common)
    for_all = pipe(PROMPTS[:2], control_image=by_image[0], **settings, **common)
    torch.testing.assert_close(for_all[:1], expected, atol=1e-4, rtol=0)
    pipe.controlnets = ControlNets(pipe.controlnets.nets[::-1])
    turned = {name: values[::-1] for name, values in settings.items()}
    torch.testing.assert_close(
        pipe(PROMPTS[0], control_image=by_image[0][::-1], **turned, **common), expected, atol=1e-5, rtol=0
    )


def test_each_prompt_has_a_weight_of_its_own(base: Path, net: Path) -> None:
    pipe = FluxImagePipeline.from_pretrained(base, controlnets=[net], **CPU)
    common = {"controlnet_conditioning_scale": 0.8, "output_type": "latent", **SMALL}
    both = pipe(PROMPTS[:2], control_image=IMAGES[:2], control_image_scale=[0.5, 1.0], seed=[3, 4], **common)
    for at, scale in enumerate((0.4, 0.8)):
        alone = common | {"controlnet_conditioning_scale": scale, "seed": 3 + at, "control_image": IMAGES[at]}
        torch.testing.assert_close(pipe(PROMPTS[at], **alone)[0], both[at], atol=1e-4, rtol=0)


def test_fill_goes_with_a_net(tmp_path: Path) -> None:
    base = make_tiny_repository(tmp_path / "fill", replace(BASE, in_channels=384))
    net = make_net(tmp_path / "net", 2, 1)
    pipe = FluxImagePipeline.from_pretrained(base, controlnets=[net], **CPU)
    mask = Image.new("L", (96, 64))
    mask.paste(255, (20, 10, 60, 50))
    read: list[Any] = []
    hook = pipe.transformer.img_in.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    options = {"input_image": IMAGES[0], "mask_image": mask, "seed": 3, "output_type": "latent"}
    found = pipe("x", control_image=IMAGES[1], **options, **SMALL | {"num_inference_steps": 1})
    hook.remove()

    noisy, embeds = read[0][..., :64], pipe.encode_prompt("x")
    with torch.inference_mode():
        control = pack(pipe.autoencoder.encode(to_pixels(IMAGES[1], 96, 64)[None]))
    inputs = {
        "encoder_hidden_states": embeds.prompt_embeds,
        "pooled_projections": embeds.pooled_prompt_embeds,
        "timestep": torch.tensor([1.0]),
        "guidance": torch.tensor([30.0]),
        "img_ids": FluxControlNetPipeline._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32),
        "txt_ids": torch.zeros(embeds.prompt_embeds.shape[1], 3),
        "return_dict": False,
    }
    with torch.inference_mode():
        double, single = FluxControlNetModel.from_pretrained(net)(noisy, controlnet_cond=control, **inputs)
        model = FluxTransformer2DModel.from_pretrained(base / "transformer")
        (velocity,) = model(read[0], controlnet_block_samples=double, controlnet_single_block_samples=single, **inputs)
    torch.testing.assert_close(pack(found), noisy - velocity, atol=1e-4, rtol=0)


def test_the_words_of_diffsynth(base: Path, tmp_path: Path) -> None:
    nets = [make_net(tmp_path / "plain", 1, 0), make_net(tmp_path / "union", 1, 1, 10)]
    pipe = FluxImagePipeline.from_pretrained(base, controlnets=nets, **CPU)
    common = {"seed": 3, "output_type": "latent", **SMALL}
    expected = pipe(
        "x",
        control_image=IMAGES[:2],
        controlnet_conditioning_scale=[0.6, 1.0],
        control_guidance_start=[0.0, 0.5],
        control_mode=[None, 4],
        **common,
    )
    union = {"image": IMAGES[1], "controlnet_id": 1, "processor_id": "pose", "start": 0.5}
    plain = SimpleNamespace(image=IMAGES[0], controlnet_id=0, scale=0.6, processor_id=None)
    torch.testing.assert_close(pipe("x", controlnet_inputs=[union, plain], **common), expected, atol=0, rtol=0)
    both = pipe(["x", "y"], controlnet_inputs=[union, plain], **common | {"seed": [3, 4]})
    torch.testing.assert_close(both[:1], expected, atol=1e-4, rtol=0)
    with pytest.raises(
        InvalidSetting, match=r"controlnet_inputs: controlnet_id = \[1, 1\]: give one input for each net"
    ):
        pipe("x", controlnet_inputs=[union, union], **common)


def test_original_keys_of_xlabs_and_true_cfg(base: Path, tmp_path: Path) -> None:
    net = make_net(tmp_path / "net", 2, 0, xlabs=True)
    original = tmp_path / "flux-canny-controlnet.safetensors"
    save_file(controlnet_from_diffusers(read_folder(net)), original)
    manager = ModelManager(torch.float32, "cpu")
    manager.load_models([original, *(base / part for part in ("text_encoder", "text_encoder_2", "vae", "transformer"))])
    reference = reference_of(base, net)
    cfg = {"negative_prompt": ["blurry"] * 3}
    assert_same(
        FluxImagePipeline.from_model_manager(manager),
        reference,
        ours={"control_image": IMAGES, "cfg_scale": 2.0, **cfg},
        theirs=with_latents(reference, 64, 96, control_image=IMAGES, true_cfg_scale=2.0, **cfg),
    )


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_net(tmp_path_factory.mktemp("nets") / "net", 2, 1)


@pytest.mark.parametrize("speed_up", ["step cache", "fp8", "bfloat16", "tiled", "twice"])
def test_speed_ups_hold(base: Path, net: Path, speed_up: str) -> None:
    common: dict[str, Any] = {"seed": 1, "output_type": "latent", "control_image": IMAGES[0], **SMALL}
    common["control_guidance_end"] = 0.5
    expected = FluxImagePipeline.from_pretrained(base, controlnets=[net], **CPU)("x", **common)
    narrow: Any = {"quantization": speed_up} if speed_up in ("fp8", "bfloat16") else {}
    options: dict[str, Any] = {
        "step cache": {"step_cache": 1e-9},
        "tiled": {"tiled": True, "tile_size": 128},
        "twice": {"control_image": IMAGES[:1] * 2, "controlnet_conditioning_scale": [0.7, 0.3]},
    }.get(speed_up, {})
    found = FluxImagePipeline.from_pretrained(base, controlnets=[net], **narrow, **CPU)("x", **common | options)
    torch.testing.assert_close(found, expected, atol=0.3 if narrow else 1e-5, rtol=0)
    assert (found - expected).abs().max() > 0 or not narrow


def test_a_step_cache_computes_where_a_net_begins_or_ends(base: Path, net: Path) -> None:
    pipe = FluxImagePipeline.from_pretrained(base, controlnets=[net], **CPU)
    common: dict[str, Any] = {"seed": 1, "output_type": "latent", "control_image": IMAGES[0], **SMALL}
    common |= {"num_inference_steps": 6, "control_guidance_start": 0.5}
    runs: list[int] = []
    residuals = pipe.controlnets.nets[0].residuals
    pipe.controlnets.nets[0].residuals = lambda *inputs: runs.append(1) or residuals(*inputs)  # type: ignore
    pipe("x", step_cache=1.0, **common)
    assert len(runs) == 2  # at the first step of the net, and at the last step
    pipe("x", **common)
    assert len(runs) == 5


def test_an_inpainting_net_reads_what_is_kept(base: Path, tmp_path: Path) -> None:
    """As in alimama's code, which diffusers lacks, the hole is black, and a channel marks the kept area."""
    folder = make_net(tmp_path / "net", 2, 0)
    state = read_folder(folder)
    state["controlnet_x_embedder.weight"] = torch.randn(len(state["controlnet_x_embedder.bias"]), 68)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    pipe = FluxImagePipeline.from_pretrained(base, controlnets=[folder], **CPU)
    mask = Image.new("L", (96, 64))
    mask.paste(255, (10, 5, 60, 41))
    black = Image.composite(Image.new("RGB", (96, 64)), IMAGES[0], mask)
    kept = 1 - torch.from_numpy(np.asarray(mask)[::8, ::8] > 127).float()
    with torch.inference_mode():
        latents = pipe.latents.encode(to_pixels(black, 96, 64)[None], None)
    condition = torch.cat((pack(latents), pack(kept[None, None])), dim=-1)
    seen: list[Any] = []
    embed = pipe.controlnets.nets[0].embed_condition
    pipe.controlnets.nets[0].embed_condition = lambda given: seen.append(given) or embed(given)  # type: ignore
    made = pipe("x", control_image=IMAGES[0], mask_image=mask, seed=1, output_type="latent", **SMALL)
    torch.testing.assert_close(seen[0], condition, atol=1e-5, rtol=0)
    assert made.isfinite().all()
    with pytest.raises(InvalidSetting, match="mask_image is missing: a ControlNet for inpainting needs it"):
        pipe("x", control_image=IMAGES[0], **SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "control_image is missing: FLUX.1 with ControlNets needs control_image"),
        ({"control_image": [IMAGES[0]], "controlnet_conditioning_scale": [1.0, 2.0]}, "2 values for 1 control images"),
        ({"control_image": IMAGES[0], "control_mode": 3}, "its ControlNet is not a union net and has no modes"),
        ({"control_image": IMAGES[0], "control_guidance_start": 0.9, "control_guidance_end": 0.2}, "the start before"),
        ({"control_image": IMAGES[0], "mask_image": IMAGES[0]}, "mask_image: needs an input_image to repaint"),
        ({"control_image": "edges.png"}, "control_image is a str: must be a PIL image"),
    ],
)
def test_a_call_that_lacks_or_has_too_much_is_refused(
    base: Path, net: Path, arguments: dict[str, Any], message: str
) -> None:
    pipe = FluxImagePipeline.from_pretrained(base, controlnets=[net], **CPU)
    with pytest.raises(InvalidSetting, match=message):
        pipe("x", **arguments, **SMALL)
    plain = FluxImagePipeline.from_pretrained(base, **CPU)("x", seed=1, output_type="latent", **SMALL)
    without = pipe("x", controlnet_conditioning_scale=0, seed=1, output_type="latent", **SMALL)
    assert torch.equal(without, plain)


@pytest.mark.parametrize(
    ("name", "value"), [("controlnet_conditioning_scale", 0.5), ("control_guidance_end", [7]), ("control_mode", "a")]
)
def test_what_nets_are_told_is_refused_without_any(base: Path, name: str, value: Any) -> None:
    with pytest.raises(InvalidSetting, match=f"{name} = .*: the model has no ControlNet; leave it out"):
        FluxImagePipeline.from_pretrained(base, **CPU)("x", **{name: value}, **SMALL)


def test_a_net_of_another_model_is_refused(base: Path, net: Path, repository: Path) -> None:
    other = make_tiny_repository(net.parent / "other", TinyFlux(num_heads=4))
    with pytest.raises(CheckpointError, match="it is of another model: numbers in a token is 32, and 64"):
        FluxImagePipeline.from_pretrained(other, controlnets=[net], **CPU)
    with pytest.raises(CheckpointError, match="is no ControlNet: it holds the transformer of a model"):
        FluxImagePipeline.from_pretrained(base, controlnets=[base / "transformer"], **CPU)
    with pytest.raises(InvalidSetting, match="cuda_graphs = True: a graph does not take the residuals"):
        FluxImagePipeline.from_pretrained(base, controlnets=[net], cuda_graphs=True, **CPU)


def test_a_job_has_its_nets_checked_when_the_model_is_loaded(base: Path, net: Path, tmp_path: Path) -> None:
    union = make_net(tmp_path / "union", 1, 0, 10)
    nets = [{"uri": str(net), "scale": 0.7}, {"uri": str(union), "mode": 2}, {"uri": str(union), "mode": 4}]
    config: Any = {"uri": str(base), "dtype": "float32"}
    pipe = load_pipeline(ModelConfig(controlnets=nets, **config), 0)
    assert pipe.needed_images == ("control_image",) * 3
    assert pipe.controlnets.nets[1] is pipe.controlnets.nets[2]
    with pytest.raises(InvalidSetting, match="control_image is missing: FLUX"):
        pipe(["x"], **SMALL)
    with pytest.raises(InvalidSetting, match="control_image: 1 images, where the model has 3 ControlNets"):
        pipe(["x"], control_image=IMAGES[0], control_mode=[None, 2, 4], **SMALL)
    with pytest.raises(InvalidSetting, match="control_mode = None of control image 2: its union ControlNet needs one"):
        load_pipeline(ModelConfig(controlnets=[*nets[:1], {"uri": str(union)}], **config), 0)
    with pytest.raises(CheckpointError, match=r"ControlNet .*gone is not there"):
        check_weights(ModelConfig(controlnets=[{"uri": str(tmp_path / "gone")}], **config))
