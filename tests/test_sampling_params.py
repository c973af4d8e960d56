from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from flux_batch.errors import InvalidSetting
from flux_batch.sampling_params import (
    ALIASES,
    MAX_SIDE,
    SAMPLING_FIELDS,
    SamplingParams,
    call_arguments,
    num_image_tokens,
)


@pytest.mark.parametrize("side", [16, 32, 1024, 1360, MAX_SIDE])
def test_sides_are_multiples_of_a_token(side: int) -> None:
    params = SamplingParams(width=side, height=side)

    assert (params.width, params.height) == (side, side)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 1000}, "width = 1000: must be a multiple of 16; the nearest are 992 and 1008"),
        ({"height": 17}, "height = 17: must be a multiple of 16; the nearest are 16 and 32"),
        ({"width": 15}, "width = 15: must be a whole number from 16 to 8192"),
        ({"width": MAX_SIDE + 16}, "width = 8208: must be a whole number from 16 to 8192"),
        ({"width": 64.0}, "width = 64.0: must be a whole number from 16 to 8192"),
        ({"height": True}, "height = True: must be a whole number from 16 to 8192"),
        ({"num_inference_steps": 0}, "num_inference_steps = 0: must be a whole number from 1 to 1000"),
        ({"num_inference_steps": -3}, "num_inference_steps = -3: must be a whole number from 1 to 1000"),
        ({"embedded_guidance": float("nan")}, "embedded_guidance = nan: must be a finite number of at least 0"),
        ({"embedded_guidance": float("inf")}, "embedded_guidance = inf: must be a finite number of at least 0"),
        ({"cfg_scale": -0.5}, "cfg_scale = -0.5: must be a finite number of at least 0"),
        ({"cfg_scale": "1"}, "cfg_scale = '1': must be a finite number of at least 0"),
        ({"t5_sequence_length": 0}, "t5_sequence_length = 0: must be a whole number from 1 to 4096"),
        ({"sigma_shift": 0.0}, "sigma_shift = 0.0: must be more than 0"),
        ({"sigma_shift": float("inf")}, "sigma_shift = inf: must be a finite number of at least 0"),
        ({"denoising_strength": 0.0}, "denoising_strength = 0.0: must be more than 0 and at most 1"),
        ({"denoising_strength": 1.1}, "denoising_strength = 1.1: must be more than 0 and at most 1"),
        ({"negative_prompt": "\ud800"}, r"negative_prompt = '\ud800': must be valid Unicode"),
    ],
)
def test_a_setting_out_of_range_says_what_would_be_right(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        SamplingParams(**values)

    assert str(caught.value) == message
    assert caught.value.field == next(iter(values))


def test_true_cfg_is_used_for_every_scale_but_one() -> None:
    assert not SamplingParams(cfg_scale=1.0, negative_prompt="blur").uses_cfg
    assert SamplingParams(cfg_scale=0.0).uses_cfg
    assert SamplingParams(cfg_scale=1.5).uses_cfg


def test_aliases_name_fields_and_shadow_none() -> None:
    assert set(ALIASES.values()) <= set(SAMPLING_FIELDS)
    assert not set(ALIASES) & set(SAMPLING_FIELDS)


def test_a_call_has_lists_for_what_each_image_has_of_its_own() -> None:
    images = [SamplingParams(cfg_scale=scale, negative_prompt=text) for scale, text in ((2.0, "a"), (3.0, "b"))]

    assert call_arguments(images) == {
        "width": 1024,
        "height": 1024,
        "num_inference_steps": 28,
        "embedded_guidance": [3.5, 3.5],
        "cfg_scale": [2.0, 3.0],
        "negative_prompt": ["a", "b"],
        "t5_sequence_length": None,
    }
    assert images[0].shared == images[1].shared


def test_a_call_has_what_pipelines_need_not_know_only_if_it_is_set() -> None:
    params = SamplingParams(sigma_shift=3.0, denoising_strength=0.5)

    assert call_arguments([params]).items() >= {"sigma_shift": 3.0, "denoising_strength": 0.5}.items()
    assert params.shared != SamplingParams().shared


def test_each_field_says_its_type_and_whether_it_is_of_one_image() -> None:
    types = {name: field.type for name, field in SAMPLING_FIELDS.items()}
    per_image = {name for name, field in SAMPLING_FIELDS.items() if field.is_per_image}

    assert (types["width"], types["sigma_shift"], types["negative_prompt"]) == (int, float, str)
    assert per_image == {"embedded_guidance", "cfg_scale", "negative_prompt"}
    assert set(types) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(("width", "height", "count"), [(1024, 1024, 4096), (16, 16, 1), (1360, 768, 85 * 48)])
def test_a_token_covers_a_square_of_sixteen_pixels(width: int, height: int, count: int) -> None:
    assert num_image_tokens(width, height) == count
