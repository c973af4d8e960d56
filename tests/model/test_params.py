"""Parameters of a model, read from the shapes of its weights."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.params import (
    AUTOENCODER,
    DEV,
    DEV_SCHEDULE,
    SCHNELL,
    SCHNELL_SCHEDULE,
    AutoencoderParams,
    FluxParams,
    ScheduleParams,
    autoencoder_params,
    count_of,
    first_step,
    flux_params,
    schedule_params,
    steps_run,
)
from flux_batch.model.sampling import make_sigmas
from flux_batch.model.transformer import Flux

AXES = ((2, 2, 2), (4, 6, 6), (8, 4, 4), (16, 56, 56))


def shapes_of(kind: type[Flux] | type[AutoEncoder], params: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in kind(params).state_dict().items()}


@pytest.mark.parametrize(("params", "count"), [(DEV, 11_901_408_320), (SCHNELL, 11_891_178_560)])
def test_transformer_has_the_published_number_of_parameters(params: FluxParams, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Flux(params).parameters()) == count


def test_autoencoder_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = AutoEncoder(AUTOENCODER)
    counts = [sum(p.numel() for p in part.parameters()) for part in (model, model.encoder, model.decoder)]
    assert counts == [83_819_683, 34_274_208, 49_545_475]
    assert len(model.state_dict()) == 244


@pytest.mark.parametrize("params", [DEV, SCHNELL])
def test_published_models_need_no_config(params: FluxParams) -> None:
    assert flux_params(shapes_of(Flux, params), {}) == params


@settings(max_examples=40)
@given(st.data())
def test_transformer_parameters_are_read_back_from_shapes(data: st.DataObject) -> None:
    axes = data.draw(st.sampled_from(AXES))
    num_heads = data.draw(st.integers(1, 5))
    width = st.integers(1, 40)
    params = FluxParams(
        in_channels=data.draw(width),
        out_channels=data.draw(width),
        vec_in_dim=data.draw(width),
        context_in_dim=data.draw(width),
        hidden_size=sum(axes) * num_heads,
        mlp_hidden_dim=data.draw(width),
        num_heads=num_heads,
        depth=data.draw(st.integers(1, 12)),
        depth_single_blocks=data.draw(st.integers(0, 12)),
        axes_dim=axes,
        theta=10_000,
        qkv_bias=data.draw(st.booleans()),
        guidance_embed=data.draw(st.booleans()),
    )
    assert flux_params(shapes_of(Flux, params), {"axes_dims_rope": list(axes)}) == params


@settings(max_examples=20)
@given(
    st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 20), st.booleans()
)
def test_autoencoder_parameters_are_read_back_from_shapes(
    channels: list[int], num_res_blocks: int, z_channels: int, shifted: bool
) -> None:
    params = AutoencoderParams(
        in_channels=3,
        out_ch=4,
        channels=tuple(channels),
        num_res_blocks=num_res_blocks,
        z_channels=z_channels,
        num_groups=4,
        scale_factor=1.5,
        shift_factor=0.25 if shifted else 0.0,
    )
    config = {"norm_num_groups": 4, "scaling_factor": 1.5, "shift_factor": 0.25 if shifted else None}
    assert autoencoder_params(shapes_of(AutoEncoder, params), config) == params
    assert params.downscale == 2 ** (len(channels) - 1)


def test_an_autoencoder_without_config_is_that_of_flux() -> None:
    assert autoencoder_params(shapes_of(AutoEncoder, AUTOENCODER), {}) == AUTOENCODER


def test_unknown_head_size_asks_for_the_axes() -> None:
    small = replace(DEV, hidden_size=32, num_heads=2, axes_dim=(4, 6, 6), depth=1, depth_single_blocks=1)
    with pytest.raises(ValueError, match=r"head size 16 .* config\.json with axes_dims_rope"):
        flux_params(shapes_of(Flux, small), {})


@pytest.mark.parametrize(
    "axes", [(16, 56), (16, 56, 58), (15, 57, 56), (64, 64), (32, 32, 32, 32), (-16, 72, 72), (0, 64, 64)]
)
def test_axes_that_do_not_fit_the_head_are_refused(axes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be three even numbers above 0, which add up to the head size 128"):
        replace(DEV, axes_dim=axes)


def test_heads_and_groups_must_divide() -> None:
    with pytest.raises(ValueError, match="not a multiple of 23 heads"):
        replace(DEV, num_heads=23)
    with pytest.raises(ValueError, match="not all multiples of 48 norm groups"):
        replace(AUTOENCODER, num_groups=48)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("img_in.weight", (3072,)),
        ("img_in.weight", (3072, 64, 1)),
        ("txt_in.weight", ()),
        ("vector_in.in_layer.weight", (3072,)),
        ("final_layer.linear.weight", (0, 3072)),
        ("double_blocks.0.img_attn.norm.query_norm.scale", (0,)),
        ("double_blocks.0.img_attn.norm.query_norm.scale", (128, 1)),
        ("double_blocks.0.img_mlp.0.weight", (12288,)),
    ],
)
def test_a_shape_that_says_nothing_is_named(key: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=key):
        flux_params({**shapes_of(Flux, DEV), key: shape}, {})


def test_blocks_are_counted_from_0_without_a_gap() -> None:
    shapes = {f"double_blocks.{i}.x": () for i in range(11)} | {"double_blocks.last.x": (), "single_blocks.40.x": ()}
    assert count_of(shapes, "double_blocks.") == 11
    assert count_of(shapes, "triple_blocks.") == 0
    for absent in (0, 3, 9):
        del shapes[f"double_blocks.{absent}.x"]
        with pytest.raises(ValueError, match=rf"double_blocks\.{absent} is missing"):
            count_of(shapes, "double_blocks.")
        shapes[f"double_blocks.{absent}.x"] = ()
    with pytest.raises(ValueError, match=r"single_blocks\.0 is missing"):
        count_of(shapes, "single_blocks.")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"norm_num_groups": 0}, "norm_num_groups in its configuration is 0, should be a number above 0"),
        ({"scaling_factor": "x"}, "scaling_factor in its configuration is 'x'"),
        ({"shift_factor": [1]}, "shift_factor"),
        ({"scaling_factor": float("nan")}, "scaling_factor"),
        ({"norm_num_groups": True}, "norm_num_groups"),
        ({"norm_num_groups": 0.5}, "norm_num_groups in its configuration is 0.5, should be a whole number"),
    ],
)
def test_settings_that_are_no_numbers_are_named(config: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        autoencoder_params(shapes_of(AutoEncoder, AUTOENCODER), config)


@pytest.mark.parametrize("value", ["16,56,56", [16, "56", 56], [16, 56.0, 56], {"a": 1}])
def test_rotary_axes_that_are_no_list_of_numbers_are_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"axes_dims_rope in its config\.json is .*list of whole numbers"):
        flux_params(shapes_of(Flux, DEV), {"axes_dims_rope": value})


def test_schedule_without_config_goes_by_the_guidance_embedder() -> None:
    assert schedule_params({}, guidance_embed=True) == DEV_SCHEDULE
    assert schedule_params({}, guidance_embed=False) == SCHNELL_SCHEDULE


def test_schedule_follows_its_config() -> None:
    config = {"use_dynamic_shifting": True, "base_shift": 0.1, "max_image_seq_len": 999, "_diffusers_version": "x"}
    expected = ScheduleParams(use_dynamic_shifting=True, base_shift=0.1, max_image_seq_len=999)
    assert schedule_params(config, guidance_embed=False) == expected
    static = schedule_params({"shift": 3.0}, guidance_embed=True)
    assert static == ScheduleParams(use_dynamic_shifting=False, shift=3.0)


def test_a_schedule_that_no_size_fits_is_refused() -> None:
    config = {"use_dynamic_shifting": True, "max_image_seq_len": 256}
    with pytest.raises(ValueError, match="base_image_seq_len and max_image_seq_len are both 256"):
        schedule_params(config, guidance_embed=True)


@pytest.mark.parametrize(
    ("num_steps", "strength", "step"),
    [(4, 1.0, 0), (4, 0.6, 1), (50, 0.8, 10), (28, 0.3, 19), (4, 0.2, 3), (4, 0.0, 4)],
)
def test_first_step_is_that_of_diffusers(num_steps: int, strength: float, step: int) -> None:
    assert first_step(num_steps, strength) == step


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.sampled_from([None, 1.0, 3.0]))
def test_what_is_counted_is_what_the_schedule_has(n: int, strength: float, sigma_shift: float | None) -> None:
    sigmas = make_sigmas(n, 4096, DEV_SCHEDULE, sigma_shift, strength)
    assert steps_run(n, strength, sigma_shift) == len(sigmas) - 1


@pytest.mark.parametrize(
    "setting",
    [
        {"use_beta_sigmas": True},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"shift_terminal": 0.02},
        {"time_shift_type": "linear"},
        {"stochastic_sampling": True},
        {"invert_sigmas": True},
        {"num_train_timesteps": 500},
        {"_class_name": "FlowMatchHeunDiscreteScheduler"},
    ],
)
def test_a_schedule_that_would_make_other_images_is_refused_by_name(setting: dict[str, object]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=re.escape(f"{name} in scheduler_config.json is {value!r}: only ")):
        schedule_params({"use_dynamic_shifting": True, **setting}, guidance_embed=True)
    assert schedule_params({name: None}, guidance_embed=True) == schedule_params({"shift": 1.0}, guidance_embed=True)
