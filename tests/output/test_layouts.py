from __future__ import annotations

import datetime
import decimal
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flux_batch.config.schema import ImageConfig, OutputConfig
from flux_batch.images import encode
from flux_batch.output.layouts import (
    RECORD_SCHEMA,
    Sample,
    image_key,
    layout_for,
    pack_failures,
    pack_metadata,
    passthrough_name,
    shard_name,
    unpack,
    unpack_metadata,
)
from flux_batch.records import ImageRecord
from flux_batch.storage.passthrough import as_json, portable
from helpers.fakes import fake_image

FORMATS = ["webdataset", "files", "parquet"]
PROMPTS = ["plain", 'say "cheese",\nplease', "猫と犬 🐈‍⬛", "x" * 2000, "a\x01b", "plain"]
UTC = datetime.UTC
MAP = pa.map_(pa.string(), pa.int8())
MOMENT = pa.timestamp("us", "UTC")
# A column of each type that may travel, with values that loaders get wrong: nulls first, whole floats, empty lists.
COLUMNS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "text": (pa.string(), [None, "", "ü 猫", "null", "1", "2020-01-01"]),
    "flag": (pa.bool_(), [None, True, False, True, None, False]),
    "whole": (pa.int64(), [None, 2**62, -1, 0, 5, 6]),
    "number": (pa.float64(), [1.0, None, 2.5, float("nan"), float("inf"), -0.0]),
    "price": (pa.decimal128(10, 2), [None, *(decimal.Decimal(text) for text in ("1.50", "2", "-3.25", "0", "7"))]),
    "day": (pa.date32(), [None, *[datetime.date(2026, 11, day) for day in range(1, 6)]]),
    "moment": (
        pa.timestamp("us", "UTC"),
        [None, *[datetime.datetime(2026, 1, day, tzinfo=UTC) for day in range(1, 6)]],
    ),
    "span": (pa.duration("ms"), [None, *[datetime.timedelta(seconds=number) for number in range(5)]]),
    "blob": (pa.binary(), [None, b"", b"\x00\xff", b"abc", b"", b"x"]),
    "tags": (pa.list_(pa.string()), [None, [], ["a", None], ["ü"], [], ["b", "c"]]),
    "box": (
        pa.struct([("x", pa.int32()), ("names", pa.list_(pa.string()))]),
        [
            None,
            {"x": 1, "names": ["a"]},
            {"x": None, "names": None},
            {"x": 2, "names": []},
            None,
            {"x": 3, "names": []},
        ],
    ),
    "nothing": (pa.null(), [None] * 6),
    "prompt": (pa.string(), ["shadows", "a", "column", "of", "the", "metadata"]),
    "image": (pa.string(), ["shadows", "the", "image", "of", "Parquet", "files"]),
    "dots.in it": (pa.int64(), [1, 2, 3, 4, 5, 6]),
}
PASSTHROUGH = pa.schema([(name, kind) for name, (kind, _) in COLUMNS.items()])


def make_samples(folder: Path, output: OutputConfig, prompts: Sequence[str] = PROMPTS) -> list[Sample]:
    """Encode an image for each prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for row, prompt in enumerate(prompts):
        record = make_record(row, prompt)
        data = encode(fake_image(prompt, seed=row, width=32, height=16), output.image, {"prompt": prompt})
        path = folder / record.key
        path.write_bytes(data)
        samples.append(Sample(with_file(record, data), path))
    return samples


def make_record(row: int, prompt: str) -> ImageRecord:
    values = {name: values[row % len(values)] for name, (_, values) in COLUMNS.items()}
    return ImageRecord(
        key=image_key("00000", row, 0),
        id=f"p.csv:{row}",
        image_index=0,
        prompt=prompt,
        negative_prompt="",
        seed=2**53 - 1 - row,
        width=32,
        height=16,
        num_inference_steps=4,
        embedded_guidance=3.0 if row % 2 else 3.5,
        cfg_scale=1.0,
        t5_sequence_length=512,
        clip_truncated=False,
        t5_truncated=row == 3,
        model="demo",
        status="success",
        passthrough=values,
    )


def with_file(record: ImageRecord, data: bytes) -> ImageRecord:
    return replace(record, file_name="train/x", sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def output_of(layout: str, **settings: Any) -> OutputConfig:
    return OutputConfig(uri="x", format=layout, **settings)  # type: ignore[arg-type]


def pack(
    folder: Path,
    output: OutputConfig,
    samples: Sequence[Sample],
    passthrough: pa.Schema = PASSTHROUGH,
    shard: str = "00000",
) -> Path:
    """Lay a shard out under `folder` as the store would hold it. Returns: the folder."""
    layout = layout_for(output, passthrough)
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    records = [sample.record for sample in samples]
    for files in (layout.pack(shard, samples, scratch), layout.list_images(shard, records, scratch)):
        for key, path in files:
            target = folder / key
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


def files_under(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(loader: str, tmp_path: Path, **data: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(loader, split="train", cache_dir=str(tmp_path / "hf-cache"), **data)


@pytest.mark.parametrize("layout", FORMATS)
def test_packing_twice_gives_the_same_bytes(tmp_path: Path, layout: str) -> None:
    output = output_of(layout)
    packed = [
        files_under(pack(tmp_path / str(turn), output, make_samples(tmp_path / f"images{turn}", output)) / "train")
        for turn in range(2)
    ]

    assert len(packed[0]) == (len(PROMPTS) + 1 if layout == "files" else 1)
    assert packed[0] == packed[1]


@pytest.mark.parametrize("layout", FORMATS)
def test_unpacking_gives_the_images_that_were_packed(tmp_path: Path, layout: str) -> None:
    output = output_of(layout, image=ImageConfig(type="jpeg"))
    samples = make_samples(tmp_path / "images", output)
    chosen = layout_for(output, PASSTHROUGH)
    (tmp_path / "scratch").mkdir()

    files = dict(chosen.pack("00000", samples, tmp_path / "scratch"))

    assert set(files) == {chosen.file_name("00000", sample.record.key) for sample in samples}
    files |= dict(chosen.list_images("00000", [sample.record for sample in samples], tmp_path / "scratch"))
    keys = [sample.record.key for sample in samples]
    assert [name for name, _ in chosen.entries("00000", files)] == list(chosen.names(keys))
    assert unpack(chosen, "00000", files) == {sample.record.key: sample.path.read_bytes() for sample in samples}


def test_a_tar_has_nothing_of_the_moment_or_the_machine_in_it(tmp_path: Path) -> None:
    output = output_of("webdataset")
    pack(tmp_path, output, make_samples(tmp_path / "images", output))

    with tarfile.open(tmp_path / "train/00000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:4]] == [
        "000000000.png",
        "000000000.txt",
        "000000000.json",
        "000000001.png",
    ]
    assert {(member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) for member in members} == {
        (0, 0, 0, "", "", 0o644)
    }


def test_the_json_of_all_samples_has_one_set_of_keys_and_types_and_no_nulls(tmp_path: Path) -> None:
    output = output_of("webdataset")
    pack(tmp_path, output, make_samples(tmp_path / "images", output))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    with tarfile.open(tmp_path / "train/00000.tar") as tar:
        texts = [tar.extractfile(member).read() for member in tar if member.name.endswith(".json")]  # type: ignore[union-attr]
    rows = [json.loads(text, parse_constant=refuse) for text in texts]
    shapes = [{name: shape_of(value) for name, value in row.items()} for row in rows]
    assert all(shape == shapes[0] for shape in shapes)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert rows[1]["prompt_"] == "a"
    assert rows[2]["blob"] == "AP8="
    assert rows[1]["moment"] == "2026-01-01T00:00:00+00:00"
    assert not {"status", "error_type", "error_message", "file_name"} & rows[0].keys()


def shape_of(value: Any) -> Any:
    """The type of a value as a loader that looks at some rows sees it; null never passes."""
    assert value is not None
    if isinstance(value, dict):
        return {name: shape_of(item) for name, item in value.items()}
    if isinstance(value, list):
        assert all(isinstance(item, str) for item in value)
        return list
    return type(value)


# webdataset leaves closing the tar to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file .*tar:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO .*tar:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("image_type", ["png", "jpeg", "webp"])
def test_webdataset_reads_the_tars(tmp_path: Path, image_type: str) -> None:
    import webdataset

    output = output_of("webdataset", image=ImageConfig(type=image_type))  # type: ignore[arg-type]
    samples = make_samples(tmp_path / "images", output)
    pack(tmp_path, output, samples)

    url = str(tmp_path / "train/00000.tar")
    rows = list(webdataset.WebDataset(url, shardshuffle=False, empty_check=False).decode("rgb8"))

    suffix = {"png": "png", "jpeg": "jpg", "webp": "webp"}[image_type]
    assert [row["__key__"] for row in rows] == [sample.record.key for sample in samples]
    assert [row["txt"] for row in rows] == PROMPTS
    assert {row[suffix].shape for row in rows} == {(16, 32, 3)}
    assert rows[5]["json"]["seed"] == samples[5].record.seed


def check_images(rows: Any, prompts: Sequence[str], image: str) -> None:
    assert len(rows) == len(prompts)
    for row, prompt in enumerate(prompts):
        expected = fake_image(prompt, seed=row, width=32, height=16)
        assert np.array_equal(np.asarray(rows[row][image]), expected)


def test_datasets_loads_the_tars(tmp_path: Path) -> None:
    output = output_of("webdataset")
    pack(tmp_path, output, make_samples(tmp_path / "images", output))

    rows = load("webdataset", tmp_path, data_files=str(tmp_path / "train/*.tar"))

    check_images(rows, PROMPTS, "png")
    assert [row["txt"] for row in rows] == PROMPTS
    assert [row["json"]["number"] for row in rows] == [1.0, 0.0, 2.5, 0.0, 0.0, 0.0]
    assert [row["json"]["tags"] for row in rows] == [[], [], ["a", ""], ["ü"], [], ["b", "c"]]


@pytest.mark.parametrize(("layout", "loader"), [("files", "imagefolder"), ("parquet", "parquet")])
def test_datasets_loads_folders_and_parquet_files_with_their_types(tmp_path: Path, layout: str, loader: str) -> None:
    output = output_of(layout)
    pack(tmp_path, output, make_samples(tmp_path / "images", output))

    where = {"imagefolder": {"data_dir": str(tmp_path / "train")}, "parquet": {"data_files": str(tmp_path / "train/*")}}
    rows = load(loader, tmp_path, **where[loader])

    check_images(rows, PROMPTS, "image")
    assert [row["prompt"] for row in rows] == PROMPTS
    for name, (kind, values) in COLUMNS.items():
        found = [row[passthrough_name(name)] for row in rows]
        if name != "number":  # NaN is not equal to itself
            assert found == values, name
        assert pa.types.is_null(kind) or rows.features.arrow_schema.field(passthrough_name(name)).type == kind


@pytest.mark.parametrize(("layout", "loader"), [("files", "imagefolder"), ("parquet", "parquet")])
def test_shards_whose_values_look_different_load_as_one_set(tmp_path: Path, layout: str, loader: str) -> None:
    output = output_of(layout)
    schema = pa.schema([("x", pa.string())])
    for shard, values in enumerate([["2026-01-01", "2026-01-02"], ["a word", None]]):
        samples = [
            Sample(replace(sample.record, passthrough={"x": value}), sample.path)
            for sample, value in zip(make_samples(tmp_path / "p", output, ["p", "q"]), values, strict=True)
        ]
        pack(tmp_path, output, samples, schema, shard=f"{shard:05d}")

    where = {"imagefolder": {"data_dir": str(tmp_path / "train")}, "parquet": {"data_files": str(tmp_path / "train/*")}}
    rows = load(loader, tmp_path, **where[loader])

    assert sorted(map(str, rows["x"])) == ["2026-01-01", "2026-01-02", "None", "a word"]


def test_parquet_has_row_groups_that_viewers_can_page_through(tmp_path: Path) -> None:
    output = output_of("parquet")
    pack(tmp_path, output, make_samples(tmp_path / "images", output, [f"p{number}" for number in range(201)]))

    file = pq.ParquetFile(tmp_path / "train/00000.parquet")
    assert [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)] == [100, 100, 1]
    first = file.read_row_group(0, columns=["image"]).to_pylist()[0]["image"]
    assert first["path"] == "000000000.png"
    assert Image.open(io.BytesIO(first["bytes"])).size == (32, 16)


def test_metadata_keeps_every_value_as_it_was() -> None:
    records = [make_record(row, prompt) for row, prompt in enumerate(PROMPTS)]

    data = pack_metadata(records, PASSTHROUGH)

    rows = unpack_metadata(data)
    assert data == pack_metadata(records, PASSTHROUGH)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert list(rows[0]) == [*RECORD_SCHEMA.names, *(passthrough_name(name) for name in COLUMNS)]
    for name, (_, values) in COLUMNS.items():
        if name != "number":
            assert [row[passthrough_name(name)] for row in rows] == values, name
    assert pq.read_schema(io.BytesIO(data)).field("moment").type == pa.timestamp("us", "UTC")


def test_failures_are_the_failed_rows_of_the_metadata() -> None:
    records = [make_record(row, prompt) for row, prompt in enumerate(PROMPTS)]
    records[2] = replace(records[2], status="failed", error_type="RowError", error_message="p.csv:2: why")

    failures = pack_failures(pack_metadata(records, PASSTHROUGH))

    assert failures is not None
    assert [(row["key"], row["error_message"]) for row in unpack_metadata(failures)] == [("000000002", "p.csv:2: why")]
    assert pack_failures(pack_metadata(records[:2], PASSTHROUGH)) is None


def test_values_of_other_types_fit_the_columns_they_were_merged_into() -> None:
    schema = pa.schema([("text", pa.string()), ("number", pa.float64())])
    record = replace(make_record(0, "p"), passthrough={"text": {"a": ["ü", None]}, "number": 2**60 + 1})

    (row,) = unpack_metadata(pack_metadata([record], schema))

    assert row["text"] == '{"a": ["ü", null]}'
    assert row["number"] == float(2**60)


def test_names_of_shards_and_images_sort_and_have_no_dots() -> None:
    assert shard_name(7, 8) == shard_name(7, 100_000) == "00007"
    assert shard_name(7, 100_001) == "000007"
    assert image_key("00007", 12, 0) == "000070012"
    assert image_key("00007", 12, 3) == "000070012_3"
    assert shard_name(99_999, 100_000) == "99999"


@pytest.mark.parametrize(
    "kind",
    [
        pa.int8(),
        pa.uint64(),
        pa.float16(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(4),
        pa.large_binary(),
        pa.date64(),
        pa.time32("s"),
        pa.time64("us"),
        pa.decimal256(50, 2),
        pa.decimal32(5, 1),
        pa.list_(pa.int64(), 3),
        pa.large_list(pa.large_string()),
        pa.dictionary(pa.int32(), pa.string()),
        pa.struct([("a", pa.list_(pa.dictionary(pa.int8(), pa.string())))]),
        pa.uuid(),
        pa.null(),
    ],
    ids=str,
)
def test_every_type_that_may_travel_is_one_that_datasets_knows(kind: pa.DataType) -> None:
    import datasets

    carried = portable(kind)

    assert portable(carried) == carried
    datasets.Features.from_arrow_schema(pa.schema([("x", carried)]))
    json.dumps(as_json(None, carried))


@pytest.mark.parametrize(
    "kind",
    [
        pa.map_(pa.string(), pa.int8()),
        pa.month_day_nano_interval(),
        pa.struct([("a", pa.map_(pa.string(), pa.int8()))]),
    ],
    ids=str,
)
def test_other_types_may_not(kind: pa.DataType) -> None:
    with pytest.raises(ValueError, match="cannot be carried along"):
        portable(kind)
