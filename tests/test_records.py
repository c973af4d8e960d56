from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_batch.errors import InvalidSetting
from flux_batch.records import ALIASES, MAX_SIDE, SAMPLING_FIELDS, ImageRecord, SamplingParams, Shard, image_seed


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


def test_seeds_stay_what_they_are_for_ever() -> None:
    """A change here would give every run of every user other images."""
    assert image_seed(0, "p.parquet:0", 0) == 8008297008445437
    assert len({image_seed(run, row, index) for run in (0, 1) for row in ("", "1", "11") for index in (0, 1, 11)}) == 18


@given(st.integers(0, 2**62), st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 999))
def test_seeds_are_exact_in_json_and_in_doubles(run_seed: int, row_id: str, index: int) -> None:
    seed = image_seed(run_seed, row_id, index)

    assert 0 <= seed < 2**53
    assert int(float(seed)) == seed == image_seed(run_seed, row_id, index)


def test_records_are_frozen_and_travel_small() -> None:
    shard = Shard(
        index=390_000,
        uri="s3://a-bucket/of/prompts/part-00017.parquet",
        name="part-00017.parquet",
        start=10**8,
        num_rows=256,
    )
    record = ImageRecord(key="k", id="i", image_index=0, prompt="p", model="m", status="failed", passthrough={"a": [1]})

    assert len(pickle.dumps(shard)) < 300
    assert pickle.loads(pickle.dumps(shard)) == shard
    assert pickle.loads(pickle.dumps(record)) == record
    with pytest.raises(dataclasses.FrozenInstanceError):
        shard.index = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.status = "success"  # type: ignore[misc]
