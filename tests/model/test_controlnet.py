"""ControlNets compared with golden numbers of diffusers, and the assignment of residuals to blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flux_batch.model.checkpoint.diffusers_keys import (
    controlnet_from_diffusers,
    controlnet_rules,
    controlnet_to_diffusers,
    original_names,
)
from flux_batch.model.conditions.controlnet import (
    ControlNet,
    ControlNetParams,
    Controls,
    ControlUse,
    spread,
)
from flux_batch.model.footprint import DEV_SIZE, controlnet_flops, residual_bytes, step_flops
from flux_batch.model.params import DEV, used_residuals
from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Denoiser, Flux, PromptEmbeds
from helpers.golden import FLUX, check, filled, tensor, weight

TEXT = PromptEmbeds(tensor("in.txt", (1, 7, 24)), tensor("in.vec", (1, 32)))
T, G = torch.tensor([0.7371]), torch.tensor([3.5])
IMG, COND = tensor("in.img", (1, 24, 64)), tensor("in.cond", (1, 24, 64))


def filled_by_diffusers_names(net: ControlNet) -> ControlNet:
    """Fill a net with the golden recipe's numbers for its file in diffusers' layout."""
    theirs = controlnet_to_diffusers(net.state_dict())
    theirs = {name: weight(name, value.shape) for name, value in theirs.items()}
    net.load_state_dict(controlnet_from_diffusers(theirs), strict=True)
    for name, value in controlnet_to_diffusers(net.state_dict()).items():
        assert torch.equal(value, theirs[name]), name
    return net.eval().requires_grad_(False)


def controls_of(net: ControlNet, base: Flux, mode: int | None, scale: float, condition: Tensor) -> Controls:
    use = ControlUse(net, net.embed_condition(condition), scale, mode=mode)
    return Controls([use], base, TEXT, lambda length: base.position_table(position_ids(length, 8, 12)), T, G)


GOLDEN: dict[str, Any] = {
    "2+1": (
        (2, 1, 0, None),
        (-24.120145, 700.103770, [0.269101, 0.012050, 0.313923], [-0.303538, -0.542199]),
        (-56.064568, 828.260535, [-1.475881, -0.358324, -1.329433], [1.067098, -0.375159]),
        (-143.578940, 1407.815513, [-0.617178, 0.803473, 1.015157], [0.089203, -1.213070]),
    ),
    "1+2 mode 4 of 10": (
        (1, 2, 10, 4),
        (-20.738378, 699.091393, [0.286894, 0.004320, 0.293430], [-0.300302, -0.541491]),
        (9.969408, 754.397096, [-1.478523, 0.158012, -0.967274], [0.985837, -0.463858]),
        (-42.243537, 1379.328946, [1.267408, 0.309167, -0.298343], [-0.440441, -1.236812]),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_residuals_and_the_controlled_model_are_golden(name: str) -> None:
    (depth, depth_single, num_modes, mode), double, single, output = GOLDEN[name]
    base: Flux = filled(Flux(FLUX))
    params = replace(FLUX, depth=depth, depth_single_blocks=depth_single)
    net = filled_by_diffusers_names(
        ControlNet(ControlNetParams(flux=params, condition_channels=64, num_modes=num_modes))
    )
    controls = controls_of(net, base, mode, 0.6, COND)

    found = controls(0, IMG)

    assert found is not None
    check(found.double[0], *double)
    check(found.single[0], *single)
    pe = base.position_table(position_ids(7, 8, 12))
    check(Denoiser(base, TEXT, pe, T, G, controls)(0, IMG), *output)


def test_xlabs_is_golden_and_repeats() -> None:
    base: Flux = filled(Flux(FLUX))
    params = replace(FLUX, depth=1, depth_single_blocks=0)
    net = filled(ControlNet(ControlNetParams(flux=params, condition_channels=64, reads_pixels=True)))
    pixels = tensor("in.image", (1, 3, 64, 96))
    check(net.input_hint_block(pixels), 17.206985, 83.989503, [0.061019, 0.065790, 0.070982], [0.003612, 0.011023])
    controls = controls_of(net, base, None, 1.0, pixels)
    found = controls(0, IMG)
    assert found is not None
    check(found.double[0], 3.999847, 850.220021, [-0.689094, -0.898844, -0.659404], [0.173141, -0.354207])
    pe = base.position_table(position_ids(7, 8, 12))
    velocity = Denoiser(base, TEXT, pe, T, G, controls)(0, IMG)
    check(velocity, -59.963585, 1336.537042, [2.322296, -0.512387, -0.382911], [0.666009, -0.881430])


@pytest.mark.parametrize(
    ("count", "blocks", "repeats", "used", "last"),
    [(5, 19, False, 5, 3), (6, 19, False, 5, 3), (4, 19, False, 4, 4), (10, 38, False, 10, 2), (2, 19, True, 2, 9)],
)
def test_each_residual_feeds_its_blocks(count: int, blocks: int, repeats: bool, used: int, last: int) -> None:
    assert used_residuals(count, blocks, repeats) == used
    found = spread([torch.tensor(float(each)) for each in range(used)], blocks, count, repeats)
    assert len(found) == blocks
    assert [float(each) for each in found].count(used - 1) == last


# Published nets: double and single blocks, modes, pixels, condition channels, parameters, share of the base's work.
PUBLISHED: dict[str, tuple[int, int, int, bool, int, int, float]] = {
    "InstantX Union": (5, 10, 10, False, 64, 3_301_956_608, 0.28),
    "Shakker Union-Pro-2.0": (6, 0, 0, False, 64, 2_140_876_800, 0.09),
    "jasper Upscaler": (5, 0, 0, False, 64, 1_791_605_248, 0.09),
    "alimama": (6, 0, 0, False, 68, 2_140_889_088, 0.09),
    "XLabs": (2, 0, 0, True, 64, 743_807_280, 0.04),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_nets_have_their_numbers(name: str) -> None:
    depth, depth_single, num_modes, reads_pixels, channels, count, share = PUBLISHED[name]
    with torch.device("meta"):
        net = ControlNet(
            ControlNetParams(
                flux=replace(DEV, depth=depth, depth_single_blocks=depth_single),
                condition_channels=channels,
                num_modes=num_modes,
                reads_pixels=reads_pixels,
            )
        )
    assert sum(parameter.numel() for parameter in net.parameters()) == count
    shapes = {key: tuple(value.shape) for key, value in controlnet_to_diffusers(net.state_dict()).items()}
    assert original_names(shapes, controlnet_rules).keys() == net.state_dict().keys()
    assert round(controlnet_flops(shapes, DEV_SIZE, 4096, 512) / step_flops(DEV_SIZE, 4096, 512), 2) == share
    residuals = min(depth, 5) + depth_single
    assert residual_bytes(shapes, DEV_SIZE, 4096, 2, "bfloat16") == (residuals + 1) * 2 * 4096 * 3072 * 2
