"""Edit pairs: each format, and each reader of a run, has the source images beside the edited images."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flux_batch.config.schema import JobConfig
from flux_batch.dataset.export.export import export
from flux_batch.errors import JobError
from flux_batch.images import AI_SOURCE_TYPE
from flux_batch.output.lease import Lease
from flux_batch.report.gallery.content import read_gallery
from flux_batch.report.verify import format_verdict, repair, verify
from flux_batch.storage.store import Store
from helpers.finished_runs import LAYOUTS, Making, finish
from helpers.job_files import data_files, make_job, metadata

# `datasets` leaves files open.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"),
]
COLOURS = ["red", "lime", "blue", "white", "black"]


def drawn(colour: str, size: tuple[int, int] = (48, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def pair_job(folder: Path, layout: str = "webdataset", **output: Any) -> JobConfig:
    """Return a job of five edits: three of a reference image, one without any image, one of an input image."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"edit {colour}", "reference_image": [drawn(colour)]} for colour in COLOURS
    ]
    rows[3]["reference_image"] = None
    rows[4] |= {"reference_image": None, "input_image": drawn(COLOURS[4], (16, 16)), "width": 16, "height": 16}
    return make_job(
        folder,
        [{"input_image": None, "width": None, "height": None} | row for row in rows],
        output={"format": layout, "sources": 1} | output,
        sampling={"resize_references": False},
        failures={"max_ratio": 1.0},
    )


def sources_of(folder: Path) -> dict[str, bytes]:
    """Return the source images under `folder` by the keys of their images, without the code under test."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                members = [member for member in tar if ".source." in member.name]
                found |= {member.name.partition(".")[0]: tar.extractfile(member).read() for member in members}  # type: ignore[union-attr]
        elif ".source." in path.name:
            found[path.name.partition(".")[0]] = path.read_bytes()
        elif path.suffix == ".parquet" and path.name != "metadata.parquet":
            rows = pq.read_table(path, columns=["key", "source"]).to_pylist()
            found |= {row["key"]: row["source"]["bytes"] for row in rows}
    return found


def colours_of(sources: dict[str, bytes]) -> list[tuple[tuple[int, int], Any]]:
    images = [Image.open(io.BytesIO(data)) for data in sources.values()]
    return [(image.size, image.getpixel((0, 0))) for image in images]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_written_verified_shown_exported_and_loaded(tmp_path: Path, layout: str) -> None:
    datasets = pytest.importorskip("datasets")
    config = pair_job(tmp_path / "run", layout)
    finish(config)
    store, out = Store(config.output.uri), Path(config.output.uri)

    rows = metadata(config)
    assert [row["status"] for row in rows] == ["success", "success", "success", "failed", "success"]
    assert "has 0 source images, but output.sources = 1" in rows[3]["error_message"]
    sources = sources_of(out / "train")
    assert colours_of(sources) == [
        ((48, 32), (255, 0, 0)),
        ((48, 32), (0, 255, 0)),
        ((48, 32), (0, 0, 255)),
        ((16, 16), (0, 0, 0)),
    ]
    made = [row for row in rows if row["status"] == "success"]
    assert [row["source_sha256"] for row in made] == [hashlib.sha256(data).hexdigest() for data in sources.values()]
    assert not any(AI_SOURCE_TYPE.encode() in data for data in sources.values())

    verdict = verify(store)
    assert verdict.problems == [], format_verdict(verdict)
    assert [problem.text for problem in verify(store, quick=True).problems] == []

    shown = [each.thumbnail for each in read_gallery(store, 10).images]
    assert [(each and each.width, each and each.height) for each in shown] == [(96, 32)] * 3 + [(32, 16)]

    for other in LAYOUTS:
        dest = Store(str(tmp_path / other))
        export(store, dest, format=other)  # type: ignore[arg-type]
        assert list(sources_of(Path(dest.uri)).values()) == list(sources.values())
    small = Store(str(tmp_path / "small"))
    export(store, small, format="parquet", max_side=16)
    assert {size for size, _ in colours_of(sources_of(Path(small.uri)))} == {(16, 11), (16, 16)}

    datasets.disable_progress_bars()
    loaded = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    name = "source.png" if layout == "webdataset" else "source"
    # `datasets` reads folders of single files in the arbitrary order of a set.
    assert sorted(np.asarray(row[name]).shape for row in loaded) == [(16, 16, 3)] + [(32, 48, 3)] * 3


@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_a_damaged_pair_is_found_and_made_again(tmp_path: Path, layout: str) -> None:
    config = pair_job(tmp_path, layout)
    finish(config)
    store, out = Store(config.output.uri), Path(config.output.uri)
    before = data_files(out)
    whole = sources_of(out / "train")["000000001"]
    path = next(out / name for name, data in before.items() if whole in data)
    path.write_bytes(path.read_bytes().replace(whole, whole[:-20] + bytes(20)))

    verdict = verify(store)
    assert "committed" in format_verdict(verdict)
    with Lease(store) as lease:
        repair(lease.store, verdict)
    making = Making()
    finish(config, making)

    assert data_files(out) == before
    assert set(making.prompts) == {"edit red", "edit lime"}  # its batch; the other images were staged


def test_several_source_images_lie_side_by_side_and_columns_of_that_name_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "two", "reference_image": [drawn("red"), drawn("blue", (32, 32))], "source": "x"}]
    output = {"sources": 2, "format": "parquet"}
    sampling = {"resize_references": False}
    config = make_job(tmp_path, rows, output=output, sampling=sampling)
    finish(config)
    (row,) = pq.read_table(Path(config.output.uri, "train/00000.parquet")).to_pylist()
    assert (row["source"]["path"], row["source_1"]["path"]) == ("000000000.source.png", "000000000.source_1.png")
    assert colours_of({"": row["source_1"]["bytes"]}) == [((32, 32), (0, 0, 255))]
    assert verify(Store(config.output.uri)).problems == []

    with pytest.raises(JobError, match=r"output.sources: writes the column 'source'.*rename"):
        make_job(tmp_path, rows, prompts={"passthrough": ["source"]}, output=output)
