from __future__ import annotations

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_batch.records import FileRange, ImageRecord, InputImage, RowImages, Shard, image_seed, split_names


def test_seeds_stay_what_they_are_for_ever() -> None:
    """If these seeds change, every run of every user makes different images."""
    assert image_seed(0, "p.parquet:0", 0) == 8008297008445437
    assert len({image_seed(run, row, index) for run in (0, 1) for row in ("", "1", "11") for index in (0, 1, 11)}) == 18


@given(st.integers(0, 2**62), st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 999))
def test_seeds_are_exact_in_json_and_in_doubles(run_seed: int, row_id: str, index: int) -> None:
    seed = image_seed(run_seed, row_id, index)

    assert 0 <= seed < 2**53
    assert int(float(seed)) == seed == image_seed(run_seed, row_id, index)


def test_records_are_frozen_and_travel_small() -> None:
    uri, name = "s3://a-bucket/of/prompts/part-00017.parquet", "part-00017.parquet"
    shard = Shard(index=390_000, parts=(FileRange(uri=uri, name=name, start=10**8, num_rows=256),))
    record = ImageRecord(key="k", id="i", image_index=0, prompt="p", model="m", status="failed", passthrough={"a": [1]})

    assert len(pickle.dumps(shard)) < 300
    assert pickle.loads(pickle.dumps(shard)) == shard
    assert pickle.loads(pickle.dumps(record)) == record
    with pytest.raises(dataclasses.FrozenInstanceError):
        shard.index = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.status = "success"  # type: ignore[misc]


@pytest.mark.parametrize("names", [["a.png"], ["a.png", "b.png"], ["a, b.png", "c.png"], ['["x.png'], ["[x].png", "é"]])
def test_the_names_of_images_are_read_back_as_they_were(names: list[str]) -> None:
    images = RowImages(reference_image=tuple(InputImage(name=name) for name in names))
    assert split_names(str(images.names["reference_image"])) == names


def test_plain_names_and_weights_are_written_plainly() -> None:
    prompts = tuple(InputImage(name=name, scale=scale) for name, scale in (("a", 1.0), ("b", 0.5), ("c", 1 / 3)))
    images = RowImages(input_image=InputImage(name="a, b"), image_prompt=prompts)

    assert (images.names["input_image"], images.names["image_prompt"]) == ("a, b", "a, b, c")
    assert str(images.scales["image_prompt_scale"]).split(", ")[:2] == ["1", "0.5"]
    assert float(str(images.scales["image_prompt_scale"]).split(", ")[2]) == 1 / 3
