"""One row -> one request, or the reason of its failure."""

from __future__ import annotations

import json
from dataclasses import asdict
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_batch.config.schema import PROMPT_FIELDS, PromptsConfig, SamplingConfig
from flux_batch.prompts.formats.table import BadRow
from flux_batch.prompts.rows import RowParser
from flux_batch.records import FailedRow, ImageRequest, image_seed
from flux_batch.sampling_params import ALIASES


def parse(values: dict[str, Any], sampling: dict[str, Any] | None = None, **prompts: Any) -> ImageRequest | FailedRow:
    parser = RowParser(PromptsConfig(uri="x", **prompts), SamplingConfig(**sampling or {}))
    return parser.parse({"prompt": "a cat"} | values, row=3, default_id="p.csv:7")


def request(values: dict[str, Any], sampling: dict[str, Any] | None = None, **prompts: Any) -> ImageRequest:
    parsed = parse(values, sampling, **prompts)
    assert isinstance(parsed, ImageRequest), parsed
    return parsed


def refusal(values: dict[str, Any]) -> str:
    parsed = parse(values)
    assert isinstance(parsed, FailedRow), parsed
    assert parsed.error_message.startswith("p.csv:7: ")
    return parsed.error_message


@pytest.mark.parametrize(
    ("column", "field"),
    [
        ("guidance_scale", "embedded_guidance"),
        ("true_cfg_scale", "cfg_scale"),
        ("max_sequence_length", "t5_sequence_length"),
    ],
)
def test_columns_may_have_the_names_of_diffusers(column: str, field: str) -> None:
    assert getattr(request({column: 7}).sampling, field) == 7
    assert getattr(request({"other": 7}, columns={column: "other"}).sampling, field) == 7


def test_two_spellings_of_one_setting_agree_or_cost_their_row() -> None:
    both = {"embedded_guidance": 2, "guidance_scale": 3}
    assert refusal(both) == (
        "p.csv:7: columns embedded_guidance and guidance_scale: two different values of one setting; "
        "leave one of them empty"
    )
    for agreeing in ({"guidance_scale": None}, {"guidance_scale": "2.0"}, {"embedded_guidance": None}):
        assert request(both | {"guidance_scale": 2} | agreeing).sampling.embedded_guidance == 2


@pytest.mark.parametrize("value", [64, 64.0, "64", "64.0", " 64 ", Decimal(64)])
def test_whole_numbers_of_any_spelling_count(value: Any) -> None:
    parsed = request({"width": value, "num_inference_steps": value, "seed": value, "num_images_per_prompt": 2})

    assert (parsed.sampling.width, parsed.sampling.num_inference_steps) == (64, 64)
    assert parsed.seeds == (64, 65)
    assert type(parsed.seeds[0]) is type(parsed.sampling.width) is int


@pytest.mark.parametrize("value", [2, 2.0, "2", "2.0", "2e0", Decimal("2.0")])
def test_numbers_of_any_spelling_count(value: Any) -> None:
    parsed = request({"embedded_guidance": value, "cfg_scale": value})

    assert parsed.sampling.embedded_guidance == parsed.sampling.cfg_scale == 2.0
    assert type(parsed.sampling.cfg_scale) is float


def test_large_seeds_are_exact() -> None:
    exact = 2**53 + 1
    spellings = (exact, np.int64(exact), np.uint64(exact), Decimal(exact), str(exact), f"{exact}.0", f" {exact} ")
    assert {request({"seed": value}).seeds for value in spellings} == {(exact,)}
    for value in (2**63 - 1, np.uint64(2**63 - 1), str(2**63 - 1)):
        assert request({"seed": value}).seeds == (2**63 - 1,)
    for value in (2**64 - 1, np.uint64(2**64 - 1), str(2**64 - 1)):  # the lower 63 bits, which make the same noise
        assert request({"seed": value}).seeds == (2**63 - 1,)
    assert request({"seed": 2**63 - 1, "num_images_per_prompt": 2}).seeds == (2**63 - 1, 0)
    assert request({"seed": 2.0**53 - 1}).seeds == (2**53 - 1,)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 1000}, "width = 1000: must be a multiple of 16; the nearest are 992 and 1008"),
        ({"height": 8}, "height = 8: must be a whole number from 16"),
        ({"height": "tall"}, "height = 'tall': must be a number"),
        ({"width": 64.5}, "width = 64.5: must be a whole number"),
        ({"width": True}, "width = True"),
        ({"num_inference_steps": -1}, "num_inference_steps = -1"),
        ({"num_inference_steps": 0}, "num_inference_steps = 0"),
        ({"embedded_guidance": float("nan")}, "embedded_guidance = nan: must be a finite number"),
        ({"embedded_guidance": "nan"}, "embedded_guidance = 'nan': must be a finite number"),
        ({"guidance_scale": float("inf")}, "embedded_guidance = inf"),
        ({"cfg_scale": -1.0}, "cfg_scale = -1.0: must be a finite number of at least 0"),
        ({"cfg_scale": [1]}, "cfg_scale = [1]: must be a number"),
        ({"cfg_scale": False}, "cfg_scale = False"),
        ({"seed": True}, "seed = True"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**64}, f"seed = {2**64}: must be a whole number from 0 to {2**64 - 1}"),
        ({"seed": 2**64 - 1, "num_images_per_prompt": 2}, f"must be a whole number from 0 to {2**64 - 2}"),
        ({"seed": 2.0**53}, "seed = 9007199254740992.0: is a float, which is not exact from 2^53 on"),
        ({"seed": "1.5"}, "seed = '1.5': must be a whole number"),
        ({"seed": Decimal("1e1000000")}, "must be a whole number"),
        ({"seed": "inf"}, "seed = 'inf': must be a finite number"),
        ({"seed": True}, "seed = True: must be a number"),
        ({"seed": 1.5}, "seed = 1.5: must be a whole number"),
        ({"seed": float("nan")}, "seed = nan"),
        ({"seed": 10**400}, "seed = 1"),
        ({"seed": "9" * 5000}, "seed = "),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt = 0"),
        ({"num_images_per_prompt": 1001}, "num_images_per_prompt = 1001"),
        ({"negative_prompt": 5}, "negative_prompt = 5: must be text"),
        ({"t5_sequence_length": 0}, "t5_sequence_length = 0"),
        ({"prompt": None}, "column 'prompt' is null"),
        ({"prompt": ""}, "column 'prompt' is empty"),
        ({"prompt": " \n"}, "column 'prompt' is empty"),
        ({"prompt": "a\0 \0c"}, "column 'prompt' holds the character NUL"),
        ({"prompt": 5}, "column 'prompt' holds int: a prompt must be text"),
        ({"prompt": "half \ud83d"}, "column 'prompt' is not valid Unicode: it holds half of a surrogate pair"),
        ({"id": "\udcff"}, "column 'id' is not valid Unicode"),
        ({"tag": [{"deep": "\ud83d"}]}, "column 'tag' is not valid Unicode"),
    ],
)
def test_a_bad_row_says_what_is_wrong(values: dict[str, Any], words: str) -> None:
    assert words in refusal(values)


def test_a_failed_row_keeps_what_could_be_read() -> None:
    parsed = parse({"prompt": "p", "id": 12, "width": 1, "tag": "t"}, passthrough=("tag",))

    assert isinstance(parsed, FailedRow)
    assert (parsed.row, parsed.id, parsed.prompt, parsed.passthrough) == (3, "12", "p", {"tag": "t"})
    assert parsed.error_type == "InvalidSetting"


def test_a_failed_row_can_be_written_whatever_was_in_it() -> None:
    parsed = parse({"prompt": "p \ud83d", "id": "\udcff", "tag": [{"deep": "\ud83d"}]}, passthrough=("tag",))

    assert isinstance(parsed, FailedRow)
    assert (parsed.id, parsed.prompt, parsed.passthrough) == ("?", "p ?", {"tag": "[{'deep': '\\ud83d'}]"})
    json.dumps(asdict(parsed), ensure_ascii=False).encode()


def test_a_row_that_no_parser_could_read_is_a_failed_row() -> None:
    parser = RowParser(PromptsConfig(uri="x"), SamplingConfig())

    parsed = parser.parse(BadRow("not valid JSON"), row=0, default_id="p.jsonl:0")

    assert parsed == FailedRow(
        row=0, id="p.jsonl:0", prompt="", error_type="RowError", error_message="p.jsonl:0: not valid JSON"
    )


def test_empty_cells_mean_the_default_but_an_empty_negative_prompt_is_one() -> None:
    defaults = {"negative_prompt": "blur", "seed": 5}

    assert request({"width": None, "negative_prompt": None}, defaults).sampling.negative_prompt == "blur"
    assert request({"negative_prompt": ""}, defaults).sampling.negative_prompt == ""


def test_times_that_python_cannot_hold_are_texts_as_others_are() -> None:
    year_10000 = pa.scalar(253402300800, pa.timestamp("s"))
    assert request({"prompt": "p", "id": year_10000}).id == "10000-01-01 00:00:00"
    assert refusal({"prompt": "p", "seed": pa.scalar(2**31 - 1, pa.date32())}).endswith("must be a number")
    assert refusal({"prompt": "p", "negative_prompt": pa.scalar(2**62, pa.duration("ms"))}).endswith("must be text")


def test_seeds_come_from_the_row_or_from_its_id() -> None:
    assert request({"seed": 0, "num_images_per_prompt": 3}).seeds == (0, 1, 2)
    derived = request({"id": "r"}, {"seed": 9, "num_images_per_prompt": 2}).seeds
    assert derived == (image_seed(9, "r", 0), image_seed(9, "r", 1))
    assert request({"id": "s"}, {"seed": 9}).seeds != derived[:1]
    assert request({"id": "r"}, {"seed": 8}).seeds != derived[:1]
    assert request({"id": ""}, {"seed": 9}).seeds == (image_seed(9, "p.csv:7", 0),)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (7, "7"),
        (7.0, "7"),
        (np.float64(7), "7"),
        (np.int64(7), "7"),
        (Decimal("7.00"), "7"),
        ("7.0", "7.0"),
        (7.5, "7.5"),
        (float("nan"), "p.csv:7"),
        (2.0**60, str(2**60)),
        (b"a-7", "a-7"),
    ],
)
def test_an_id_is_the_same_text_whatever_its_column_is_stored_as(value: Any, name: str) -> None:
    assert request({"id": value}).id == name


cells = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.just([]),
    st.just({}),
)


names = (*PROMPT_FIELDS, *ALIASES)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(names), cells))
def test_no_row_whatever_is_in_it_is_an_outage(values: dict[str, Any]) -> None:
    parsed = parse(values)

    assert isinstance(parsed.id, str)
    assert isinstance(parsed.prompt, str)
    if isinstance(parsed, ImageRequest):
        assert all(0 <= seed < 2**63 for seed in parsed.seeds)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("a.png", "a.png"),
        ({"bytes": None, "path": "a.png"}, "a.png"),
        ({"bytes": b"x", "path": "a.png"}, "sha256:2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"),
        (b"x", "sha256:2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"),
        ({"bytes": None, "path": None}, "/job.png"),
        (None, "/job.png"),
        ("", None),
    ],
)
def test_a_cell_or_the_job_says_what_a_row_starts_from(value: Any, name: str | None) -> None:
    found = request({"input_image": value, "denoising_strength": 1}, {"input_image": "/job.png"}).images.input_image

    assert (found and found.name) == name


def test_a_text_cell_may_hold_a_list_as_csv_has_none() -> None:
    found = request({"control_image": '["a.png", "b, c.png"]', "control_image_scale": "[0.5, 1]"}).images

    assert [(image.name, image.scale) for image in found.control_image] == [("a.png", 0.5), ("b, c.png", 1.0)]
    assert [image.name for image in request({"reference_image": "[a].png"}).images.reference_image] == ["[a].png"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"input_image": 5}, "column 'input_image' holds int: must be a path, an address, bytes, or a struct"),
        ({"input_image": {"bytes": 5}}, "column 'input_image' holds int"),
        ({"input_image": ["a.png"]}, "column 'input_image' holds list"),
        ({"input_image": b""}, "input_image: is empty"),
        ({"mask_image": "a.png"}, "mask_image a.png: needs an input_image, and there is none"),
        ({"mask_image": "../m.png", "input_image": "a.png"}, "mask_image ../m.png: leads out of"),
        ({"control_image": ["a.png", 7]}, "column 'control_image' holds int"),
        ({"control_image": ["a.png"] * 17}, "column 'control_image' holds 17 images, more than 16"),
        ({"image_prompt": "a.png", "image_prompt_scale": [1, 2]}, "image_prompt_scale: 2 weights for 1 image"),
        ({"control_image": ["a.png"], "control_image_scale": [1, 2]}, "control_image_scale: 2 weights for 1 image"),
        ({"image_prompt": "a.png", "image_prompt_scale": "much"}, "image_prompt_scale = 'much': must be a number"),
        ({"image_prompt_scale": 3}, "image_prompt_scale: needs image_prompt, and there is none"),
        ({"control_image": ["a.png", None]}, "column 'control_image': image 2 of 2 is empty"),
        ({"control_image": '["a.png", ""]'}, "column 'control_image': image 2 of 2 is empty"),
        ({"input_image": "/etc/passwd"}, "input_image /etc/passwd: a row may name an absolute path only under"),
        ({"denoising_strength": 0.5}, "denoising_strength = 0.5: needs an input_image, and there is none"),
        ({"denoising_strength": 0}, "denoising_strength = 0.0: must be more than 0 and at most 1"),
        ({"sigma_shift": "much"}, "sigma_shift = 'much': must be a number"),
    ],
)
def test_a_row_that_cannot_start_says_why(values: dict[str, Any], reason: str) -> None:
    assert reason in refusal(values)
