from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flux_batch.output.paths import RunFolder
from flux_batch.output.staging import StagedImage, Staging, staged_record
from flux_batch.storage.store import Store

IMAGES = [
    StagedImage(
        "000030000", {"prompt": "猫 \x01", "seed": 2**61, "cfg_scale": 0.1, "t5_truncated": True}, b"\0png" * 9
    ),
    StagedImage("000030001", {"error_type": "RowError", "error_message": "no"}, b""),
]


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(RunFolder(Store(str(tmp_path)), 9))


def object_path(staging: Staging, name: str) -> Path:
    return Path(staging.run.store.uri, "_run/staging/00003", name)


def test_what_is_staged_comes_back(staging: Staging) -> None:
    name = staging.put(3, IMAGES)

    assert staging.list(3).objects == {name}
    assert staging.read(3, name) == IMAGES
    assert staging.list(2).objects == frozenset()
    assert staging.shards() == {3}


def test_writers_never_meet(staging: Staging) -> None:
    names = {staging.put(3, IMAGES) for _ in range(3)}

    assert staging.list(3).objects == names
    assert len(names) == 3


def test_damage_at_any_byte_makes_the_object_worth_nothing(staging: Staging) -> None:
    name = staging.put(3, IMAGES)
    path = object_path(staging, name)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        assert staging.read(3, name) in ([], IMAGES), place  # some bytes of a Parquet file have no meaning
    for length in range(0, len(whole), 50):
        path.write_bytes(whole[:length])
        assert staging.read(3, name) == []
    for imaged in (b"\0png" * 9, "猫".encode(), b"000030001"):
        path.write_bytes(whole.replace(imaged, bytes([imaged[0] ^ 1]) + imaged[1:]))
        assert staging.read(3, name) == []


def test_what_another_removed_holds_nothing(staging: Staging) -> None:
    name = staging.put(3, IMAGES)
    staging.remove(3)

    assert staging.read(3, name) == ()


def test_announcements_left_behind_are_counted_by_label(staging: Staging) -> None:
    staging.mark_started(3, "000030000_1", "host:1")
    staging.mark_started(3, "000030000_1", "host:2")
    staging.mark_started(3, "b4", "host:2")
    lived = staging.mark_started(3, "000030001", "host:2")
    name = staging.put(3, IMAGES)
    assert staging.list(3).tries == Counter({"000030000_1": 2, "b4": 1, "000030001": 1})

    staging.unmark(lived)
    staging.unmark(lived)

    assert staging.list(3).tries == Counter({"000030000_1": 2, "b4": 1})
    assert staging.list(3).objects == {name}


def test_losses_are_forgotten_by_label(staging: Staging) -> None:
    name = staging.put(3, IMAGES)
    for label in ("b0", "000030001", "000030001", "000030002"):
        staging.mark_started(3, label, "worker")

    staging.forget_losses(3, {"000030001", "000030004"})

    assert staging.list(3).tries == Counter({"b0": 1, "000030002": 1})
    assert staging.list(3).objects == {name}


def test_removing_empties_one_shard(staging: Staging) -> None:
    staging.put(3, IMAGES)
    staging.mark_started(3, "b4", "host:2")
    name = staging.put(4, IMAGES)

    staging.remove(3)
    staging.remove(3)

    assert staging.list(3).objects == frozenset()
    assert not staging.list(3).tries
    assert staging.shards() == {4}
    assert os.listdir(object_path(staging, name).parents[1] / "00004") == [name]

    staging.clear()
    staging.clear()
    assert staging.shards() == set()
    assert not object_path(staging, name).parents[1].exists()


def test_a_row_of_the_metadata_can_be_staged_as_a_record_can() -> None:
    record = {"key": "k", "prompt": "p", "tile_size": 64, "sigma_shift": None, "lora": ""}
    row = record | {"status": "success", "error_type": None, "sha256": "ab", "bytes": 2, "file_name": "train/x"}
    row |= {"their own column": 1}

    assert staged_record(row) == staged_record(record) == {"key": "k", "prompt": "p", "tile_size": 64, "lora": ""}


@pytest.mark.s3
def test_in_a_bucket(s3_store: Any) -> None:
    staging = Staging(RunFolder(Store(s3_store.uri, s3_store.storage_options), 9))
    names = {staging.put(3, IMAGES), staging.put(3, IMAGES[:1])}
    staging.mark_started(3, "b0", "host:1")

    assert staging.list(3).objects == names
    assert {len(staging.read(3, name)) for name in names} == {1, 2}
    assert staging.shards() == {3}

    staging.remove(3)
    assert staging.list(3) == staging.list(8)
    assert staging.shards() == set()
