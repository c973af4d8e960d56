import hashlib
import io
from pathlib import Path
from typing import Any

import pytest

from flux_batch.engine.local import LocalEngine
from flux_batch.errors import NotFound
from flux_batch.job import run
from flux_batch.output.partial_read import BLOCK, StoredFileReader, read_images
from flux_batch.storage.store import Store
from helpers.fakes import make_fake_pipeline
from helpers.job_files import make_job, metadata


class Meter(Store):
    """A store that notes what is read of it."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.num_bytes = 0

    def read_range(self, key: str, start: int, end: int) -> bytes:
        self.num_bytes += end - start
        return super().read_range(key, start, end)


def render(folder: Path, layout: str, side: int = 16, **output: Any) -> dict[str, dict[str, Any]]:
    config = make_job(
        folder,
        [{"prompt": f"image {number}"} for number in range(16)],
        output={"uri": str(folder / "out"), "shard_size": 16, "format": layout, **output},
        sampling={"width": side, "height": side, "num_inference_steps": 1},
    )
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    return {row["key"]: row for row in metadata(config)}


@pytest.mark.parametrize("layout", ["webdataset", "parquet", "files"])
def test_some_images_are_read_and_not_the_others(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux_batch.output.layouts.IMAGES_PER_ROW_GROUP", 4)
    rows = render(tmp_path, layout, side=256)
    store = Meter(str(tmp_path / "out"))
    key = list(rows)[3]
    row = rows[key]
    images = dict(read_images(store, row["file_name"], {key: row["bytes"]}))

    assert list(images) == [key]
    assert len(images[key]) == row["bytes"]
    assert hashlib.sha256(images[key]).hexdigest() == row["sha256"]
    # An image of noise has some 200 kB; of the others before it no more than the block around a header is read.
    assert row["bytes"] > 2.5 * BLOCK
    total = sum(each["bytes"] for each in rows.values())
    assert store.num_bytes < total / 2.5


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_images_come_in_the_order_of_the_file_and_unknown_ones_not(tmp_path: Path, layout: str) -> None:
    rows = render(tmp_path, layout)
    keys = [list(rows)[number] for number in (15, 0, 7)]
    sizes = {key: rows[key]["bytes"] for key in keys} | {"999999999": 5}
    found = dict(read_images(Store(str(tmp_path / "out")), rows[keys[0]]["file_name"], sizes))
    assert list(found) == sorted(keys)
    assert all(hashlib.sha256(data).hexdigest() == rows[key]["sha256"] for key, data in found.items())


def test_more_than_is_recorded_is_not_read(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write("train/00000/1.png", bytes(1000))
    assert dict(read_images(store, "train/00000/1.png", {"1": 10})) == {"1": bytes(11)}


def test_a_stored_file_reads_like_a_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    store = Store(str(tmp_path))
    store.write("file", data)
    with io.BufferedReader(StoredFileReader(store, "file"), 100) as file:
        assert file.read(10) == data[:10]
        assert file.seek(-5, io.SEEK_END) == len(data) - 5
        assert file.read() == data[-5:]
        assert file.read(1) == b""
        file.seek(1000)
        file.seek(5, io.SEEK_CUR)
        assert (file.tell(), file.read(5000)) == (1005, data[1005:6005])
        file.seek(10**9)
        assert file.read(5) == b""
    with pytest.raises(ValueError, match="cannot seek to -1"):
        StoredFileReader(store, "file").seek(-1)
    with pytest.raises(NotFound):
        StoredFileReader(store, "none")
