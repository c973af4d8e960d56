from __future__ import annotations

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
from flux_batch.engine.local import LocalEngine
from flux_batch.images import encode
from flux_batch.job import run
from flux_batch.output.formats import Sample, format_for, iter_images
from flux_batch.output.metadata import passthrough_name
from flux_batch.records import ImageRecord
from flux_batch.storage.store import BLOCK_BYTES, Store
from helpers.fakes import fake_image, make_fake_pipeline
from helpers.image_records import COLUMNS, PASSTHROUGH, PROMPTS, make_record
from helpers.job_files import make_job, metadata

FORMATS = ["webdataset", "files", "parquet"]


def make_samples(folder: Path, output: OutputConfig, prompts: Sequence[str] = PROMPTS) -> list[Sample]:
    """Return an encoded image for each prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for row, prompt in enumerate(prompts):
        record = make_record(row, prompt)
        data = encode(fake_image(prompt, seed=row, width=32, height=16), output.image, {"prompt": prompt})
        path = folder / record.key
        path.write_bytes(data)
        samples.append(Sample(with_file(record, data), path))
    return samples


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
    """Write a shard under `folder` as in the store. Returns: the folder."""
    layout = format_for(output, passthrough)
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
    chosen = format_for(output, PASSTHROUGH)
    (tmp_path / "scratch").mkdir()

    files = dict(chosen.pack("00000", samples, tmp_path / "scratch"))

    assert set(files) == {chosen.file_name("00000", sample.record.key) for sample in samples}
    files |= dict(chosen.list_images("00000", [sample.record for sample in samples], tmp_path / "scratch"))
    keys = [sample.record.key for sample in samples]
    assert [name for name, _ in chosen.entries("00000", files)] == list(chosen.entry_names(keys))
    assert dict(iter_images(chosen, "00000", files)) == {
        sample.record.key: sample.path.read_bytes() for sample in samples
    }


@pytest.mark.parametrize(("num_sources", "expected"), [(0, [3, 1, 2, 1, 1]), (1, [1, 1, 1, 1, 1, 1, 1, 1])])
def test_a_row_group_has_a_bound_in_bytes_too(
    tmp_path: Path, num_sources: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow cannot read a row group with 2 GiB of images, such as 90 of 4096 x 4096."""
    monkeypatch.setattr("flux_batch.output.formats.BYTES_PER_ROW_GROUP", 100)
    samples = []
    for row, size in enumerate([40, 50, 10, 60, 50, 50, 200, 90]):
        record = make_record(row, "a star")
        path = tmp_path / record.key
        path.write_bytes(bytes(size))
        path.with_name(f"{record.key}.source").write_bytes(bytes(60))
        samples.append(Sample(with_file(record, bytes(size)), path))

    folder = pack(tmp_path / "packed", output_of("parquet", sources=num_sources), samples)

    about = pq.ParquetFile(folder / "train/00000.parquet").metadata
    assert [about.row_group(number).num_rows for number in range(about.num_row_groups)] == expected


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
    """Return the type of a value as a loader infers it from some rows; null is an error."""
    assert value is not None
    if isinstance(value, dict):
        return {name: shape_of(item) for name, item in value.items()}
    if isinstance(value, list):
        assert all(isinstance(item, str) for item in value)
        return list
    return type(value)


# webdataset leaves the tar to the garbage collector to close.
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


class Meter(Store):
    """A store that counts the bytes that are read."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.num_bytes = 0

    def read_range(self, key: str, start: int, end: int) -> bytes:
        self.num_bytes += end - start
        return super().read_range(key, start, end)


def render(folder: Path, layout: str, side: int = 16) -> dict[str, dict[str, Any]]:
    config = make_job(
        folder,
        [{"prompt": f"image {number}"} for number in range(16)],
        output={"uri": str(folder / "out"), "shard_size": 16, "format": layout},
        sampling={"width": side, "height": side, "num_inference_steps": 1},
    )
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    return {row["key"]: row for row in metadata(config)}


@pytest.mark.parametrize("layout", ["webdataset", "parquet", "files"])
def test_some_images_are_read_and_not_the_others(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux_batch.output.formats.IMAGES_PER_ROW_GROUP", 4)
    rows = render(tmp_path, layout, side=256)
    store = Meter(str(tmp_path / "out"))
    key = list(rows)[3]
    row = rows[key]
    images = dict(format_for(output_of(layout)).read_images(store, row["file_name"], {key: row["bytes"]}))

    assert list(images) == [key]
    assert len(images[key]) == row["bytes"]
    assert hashlib.sha256(images[key]).hexdigest() == row["sha256"]
    # An image of noise has some 200 kB. Of the images before it, only the block around each header is read.
    assert row["bytes"] > 2.5 * BLOCK_BYTES
    total = sum(each["bytes"] for each in rows.values())
    assert store.num_bytes < total / 2.5


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_images_come_in_the_order_of_the_file_and_unknown_ones_not(tmp_path: Path, layout: str) -> None:
    rows = render(tmp_path, layout)
    keys = [list(rows)[number] for number in (15, 0, 7)]
    sizes = {key: rows[key]["bytes"] for key in keys} | {"999999999": 5}
    store = Store(str(tmp_path / "out"))
    found = dict(format_for(output_of(layout)).read_images(store, rows[keys[0]]["file_name"], sizes))
    assert list(found) == sorted(keys)
    assert all(hashlib.sha256(data).hexdigest() == rows[key]["sha256"] for key, data in found.items())


def test_more_than_is_recorded_is_not_read(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write("train/00000/1.png", bytes(1000))
    assert dict(format_for(output_of("files")).read_images(store, "train/00000/1.png", {"1": 10})) == {"1": bytes(11)}
