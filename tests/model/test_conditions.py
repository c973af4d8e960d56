"""Conditions besides the text: golden numbers of Fill and Canny, the tokens of a mask, variants of files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from flux_batch.model.checkpoint.checkpoint import open_checkpoint
from flux_batch.model.conditions.channels import WithChannels, pack_mask
from flux_batch.model.conditions.redux import Redux
from flux_batch.model.conditions.reference import WithReferences, placed
from flux_batch.model.conditions.variant import (
    CANNY,
    DEPTH,
    FILL,
    KONTEXT,
    KREA,
    TEXT_TO_IMAGE,
    UNTOLD,
    Variant,
    variant_of,
)
from flux_batch.model.conditions.vision import load_clip_vision, load_siglip
from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Denoiser, Flux, PromptEmbeds
from helpers.golden import FLUX, check, filled, tensor, weight
from helpers.tiny_flux import TINY_TOWER

# Sum, sum of magnitudes, first three and last two numbers: from diffusers 0.42.1.
GOLDEN: dict[str, tuple[int, Any]] = {
    "in.cond": (128, (95.330397, 1350.235608, [1.973600, -0.208372, -0.090430], [-0.725940, -2.005892])),
    "in.fill": (384, (97.362379, 1330.521212, [1.724235, -0.354266, 1.158581], [-0.736778, -1.683537])),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_condition_channels_are_golden(name: str) -> None:
    width, numbers = GOLDEN[name]
    model: Flux = filled(Flux(replace(FLUX, in_channels=width)))
    text = PromptEmbeds(tensor("in.txt", (1, 7, 24)), tensor("in.vec", (1, 32)))
    pe = model.position_table(position_ids(7, 8, 12))
    denoiser = Denoiser(model, text, pe, torch.tensor([0.7371]), torch.tensor([3.5]))
    velocity = WithChannels(denoiser, tensor(name, (1, 24, width - 64)))
    check(velocity(0, tensor("in.img", (1, 24, 64))), *numbers)


def test_reference_tokens_are_golden() -> None:
    model: Flux = filled(Flux(FLUX))
    text = PromptEmbeds(tensor("in.txt", (1, 7, 24)), tensor("in.vec", (1, 32)))
    pe = model.position_table(position_ids(7, 8, 12, placed([(6, 12)])))
    denoiser = Denoiser(model, text, pe, torch.tensor([0.7371]), torch.tensor([3.5]))
    velocity = WithReferences(denoiser, tensor("in.ref", (1, 18, 64)))(0, tensor("in.img", (1, 24, 64)))
    check(velocity, 55.695704, 1350.257828, [2.160976, -1.161947, 0.618606], [-0.402722, -2.297833])


def test_redux_and_its_tower_are_golden(tmp_path: Path) -> None:
    redux: Redux = filled(Redux(32, 72, 24))
    tokens = redux(tensor("in.siglip", (1, 9, 32)))
    check(tokens, -9.786572, 52.142723, [0.422762, 0.226820, 0.044598], [0.923679, -0.399331])
    model: Flux = filled(Flux(FLUX))
    text = PromptEmbeds(torch.cat((tensor("in.txt", (1, 7, 24)), tokens), dim=1), tensor("in.vec", (1, 32)))
    pe = model.position_table(position_ids(16, 8, 12))
    velocity = Denoiser(model, text, pe, torch.tensor([0.7371]), torch.tensor([3.5]))(0, tensor("in.img", (1, 24, 64)))
    check(velocity, 58.791220, 1354.060949, [2.029942, -0.622646, 0.311702], [-0.449164, -2.042084])

    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=44, patch_size=14
    )
    names = {f"vision_model.{name}": value.shape for name, value in SiglipVisionModel(config).state_dict().items()}
    save_file({name: weight(name, shape) for name, shape in names.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config.to_json_string())
    tower = load_siglip(open_checkpoint(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode():
        states = tower(tensor("in.pixels", (1, 3, 44, 44)))
    check(states, 3.974620, 227.955475, [1.020633, -0.505703, -0.844206], [0.959002, -0.300316])


def test_the_vision_tower_of_clip_is_golden(tmp_path: Path) -> None:
    config = CLIPVisionConfig(**TINY_TOWER, image_size=28, projection_dim=24)
    names = {name: value.shape for name, value in CLIPVisionModelWithProjection(config).state_dict().items()}
    save_file({name: weight(name, shape) for name, shape in names.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config.to_json_string())
    tower = load_clip_vision(open_checkpoint(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode():
        embeds = tower(tensor("in.pixels28", (1, 3, 28, 28)))
    check(embeds, 1.685442, 18.815758, [1.586078, 0.606677, 0.160884], [0.900424, 0.861992])


@pytest.mark.parametrize(
    ("sizes", "places"),
    [
        ([(8, 12)], [(0, 0)]),
        ([(8, 12), (8, 12)], [(0, 0), (4, 0)]),
        ([(12, 8), (12, 8), (12, 16)], [(0, 0), (0, 4), (6, 0)]),
        ([(4, 64), (4, 4), (64, 4)], [(0, 0), (2, 0), (0, 32)]),
    ],
)
def test_references_lie_beside_each_other(sizes: list[tuple[int, int]], places: list[tuple[int, int]]) -> None:
    found = placed(sizes)
    assert [(each.row, each.col) for each in found] == places
    ids = position_ids(2, 4, 4, found)
    assert ids[:2].tolist() == [[0, 0, 0]] * 2
    assert ids[-4:].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    references = ids[2:-4]
    assert set(references[:, 0].tolist()) == {1}
    assert len(references) == len(set(map(tuple, references.tolist()))) == sum(h // 2 * (w // 2) for h, w in sizes)


def test_every_pixel_of_a_mask_is_in_its_token() -> None:
    """The place of a pixel: black-forest-labs/flux, prepare_fill."""
    height, width = 48, 32
    packed = pack_mask(torch.arange(height * width).reshape(1, 1, height, width), 8)
    assert packed.shape == (1, 6, 256)
    for y, x in [(0, 0), (0, 1), (1, 0), (7, 9), (8, 7), (17, 31), (47, 31), (33, 18)]:
        token, channel = y // 16 * (width // 16) + x // 16, (y % 8 * 8 + x % 8) * 4 + y // 8 % 2 * 2 + x // 8 % 2
        assert packed[0, token, channel] == y * width + x


@pytest.mark.parametrize(
    ("channels", "name", "hints", "variant"),
    [
        (64, "auto", ["flux1-dev.safetensors"], TEXT_TO_IMAGE),
        (64, "auto", ["flux1-dev-kontext_fp8_scaled.safetensors"], KONTEXT),
        (64, "auto", ["part-1.gguf", "FluxKontextPipeline"], KONTEXT),
        (64, "auto", ["kontext-tests", "FLUX.1-dev"], TEXT_TO_IMAGE),
        (64, "auto", ["flux1-krea-dev_fp8_scaled.safetensors"], KREA),
        (64, "kontext", ["flux1-dev.safetensors"], KONTEXT),
        (384, "auto", ["flux1-dev.safetensors"], FILL),
        (128, "auto", ["transformer", "FLUX.1-Depth-dev", "flux1-canny"], DEPTH),
        (128, "auto", ["canny", "FluxControlPipeline"], UNTOLD),
        (128, "auto", ["flux1-CANNY-dev-fp8.safetensors"], CANNY),
        (128, "canny", ["flux1-depth-dev.safetensors"], CANNY),
    ],
)
def test_channels_then_names_tell_the_variant(channels: int, name: str, hints: list[str], variant: Variant) -> None:
    assert variant_of(replace(FLUX, in_channels=channels), name, hints) is variant


def test_a_variant_that_the_channels_contradict_is_refused() -> None:
    with pytest.raises(ValueError, match="the variant depth was given, but by its channels it is fill"):
        variant_of(replace(FLUX, in_channels=384), "depth")
