"""The chunks of the gallery, read as its page reads them."""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flux_batch.errors import JobError
from flux_batch.output.gc import find_leftovers
from flux_batch.output.metadata import parquet_bytes
from flux_batch.report.gallery.content import read_gallery
from flux_batch.report.gallery.write import PAGE, write_gallery, write_single_file
from flux_batch.report.saved_run import SavedRun
from flux_batch.storage.store import Store
from helpers.finished_runs import LAYOUTS, finish
from helpers.job_files import make_job

HOSTILE = ["</script><script>alert(1)</script>", 'it\'s \\ "quoted" \u2028 \x00 \U0001f600', "<!--"]


class Loaded:
    """The rows of a run that a page loads, and its thumbnails by key."""

    def __init__(self, output: Path, folder: str = "run") -> None:
        self.rows: list[dict[str, Any]] = []
        self.images: dict[str, bytes] = {}
        page = (output / PAGE).read_text()
        for address in re.findall(rf'src="({folder}/rows/[^"]+)"', page):
            self._load((output / PAGE).parent, folder, address)

    def _load(self, root: Path, folder: str, address: str) -> None:
        text = (root / address).read_text().removeprefix("gallery.rows('").removesuffix("');\n")
        assert "'" not in re.sub(r"\\.", "", text)
        # JSON in a browser has no Infinity.
        chunk = json.loads(re.sub(r"\\(.)", r"\1", text), parse_constant=pytest.fail)
        rows: list[dict[str, Any]] = [{} for _ in range(chunk["num"])]
        for name, column in chunk["columns"].items():
            values = column.get("each") or [column["values"][code] for code in column.get("codes", ())]
            for row, value in zip(rows, values or [column["all"]] * chunk["num"], strict=True):
                row[name] = value
        for name, numbers in chunk["thumbnails"].items():
            script = (root / folder / "thumbnails" / f"{name}.js").read_text()
            small = json.loads(script.removeprefix("gallery.thumbnails(").removesuffix(");\n"))
            for number, place in numbers:
                self.images[rows[number]["key"]] = base64.b64decode(small[place])
        self.rows += rows

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows]


def rendered(folder: Path, rows: list[dict[str, Any]], **sections: dict[str, Any]) -> Store:
    finish(make_job(folder, rows, failures={"max_ratio": 1.0}, **sections))
    return Store(str(folder / "out"))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux_batch.report.gallery.chunks.ROWS_PER_CHUNK", 5)
    monkeypatch.setattr("flux_batch.report.gallery.chunks.IMAGES_PER_CHUNK", 3)
    monkeypatch.setattr("flux_batch.report.gallery.chunks.IMAGES_AT_ONCE", 6)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_has_its_image_or_its_reason(tmp_path: Path, layout: str) -> None:
    rows = [{"prompt": f"[raise] {n}" if n in (3, 9) else f"p{n}", "price": n / 8} for n in range(24)]
    store = rendered(tmp_path, rows, output={"format": layout, "shard_size": 8}, prompts={"passthrough": ["price"]})
    write_gallery(store, 1000)
    loaded = Loaded(tmp_path / "out")

    assert loaded.column("prompt") == [row["prompt"] for row in rows]
    assert loaded.column("price") == [row["price"] for row in rows]
    expected = {str(each.row["key"]): each.thumbnail.data for each in read_gallery(store, 24).images if each.thumbnail}
    assert loaded.images == expected
    assert len(expected) == 22
    failed = [row for row in loaded.rows if row["status"] == "failed"]
    assert [row["error_type"] for row in failed] == ["RuntimeError"] * 2
    assert "asked to fail" in failed[0]["error_message"]
    assert list(find_leftovers(SavedRun.open(store).folder)) == []


def test_what_an_earlier_gallery_has_left_is_removed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = rendered(tmp_path, [{"prompt": "p"}])
    old = [f"_run/gallery/run/thumbnails/00000/{number}-old.js" for number in range(9)]
    for key in old:
        store.write(key, b"x")
    asked: list[list[str]] = []
    delete_many = Store.delete_many
    monkeypatch.setattr(Store, "delete_many", lambda self, keys: asked.append(keys) or delete_many(self, keys))

    write_gallery(store, 10)

    assert asked == [old]  # in a bucket, one request for a thousand
    assert not set(old) & set(store.list("_run/gallery"))


@pytest.mark.usefixtures("small_chunks")
def test_only_what_is_missing_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = rendered(tmp_path, [{"prompt": f"p{n}"} for n in range(16)], output={"format": "files", "shard_size": 8})
    victim = tmp_path / "out/train/00001/000010004.png"
    whole = victim.read_bytes()
    victim.write_bytes(b"other")
    write_gallery(store, 1000)
    loaded = Loaded(tmp_path / "out")
    assert (loaded.rows[12]["status"], loaded.rows[12]["error_message"]) == (
        "unreadable",
        "its bytes differ from those in the metadata",
    )
    assert len(loaded.images) == 15

    written: list[str] = []
    write = Store.write
    monkeypatch.setattr(Store, "write", lambda store, key, data: (written.append(key), write(store, key, data))[1])
    victim.write_bytes(whole)
    write_gallery(store, 1000)
    assert [key.partition("-")[0] for key in written if "/thumbnails/" in key] == [
        "_run/gallery/run/thumbnails/00001/1"
    ]
    assert len(Loaded(tmp_path / "out").images) == 16
    assert not [key for key in store.list("_run/gallery") if "-some" in key]

    written.clear()
    write_gallery(store, 5)  # other images share a chunk
    assert {len(Loaded(tmp_path / "out").images), sum("/rows/" in key for key in written)} == {5, 1}
    write_single_file(store, 5)
    assert store.list("_run/gallery") == ["_run/gallery/contact-sheet.jpg", "_run/gallery/index.html"]


def test_no_shard_is_read_that_has_nothing_to_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "[raise]" if n == 9 else f"p{n}"} for n in range(16)]
    store = rendered(tmp_path, rows, output={"shard_size": 4})
    keys = set[str]()
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda store, key: (keys.add(key), read(store, key))[1])

    write_gallery(store, 1)

    assert len(Loaded(tmp_path / "out").rows) == 2  # the image in the middle, and the failed one
    assert {key for key in keys if key.startswith("metadata/")} == {"metadata/00001.parquet", "metadata/00002.parquet"}
    assert not [key for key in keys if key.startswith("_run/commits/")]


def test_hostile_rows_are_data(tmp_path: Path) -> None:
    rows = [{"prompt": text, "id": f"{text[:9]}{n}", "odd": [text]} for n, text in enumerate(HOSTILE * 2)]
    rows[0]["prompt"] = "x" * 5000
    store = rendered(tmp_path, rows, prompts={"passthrough": ["odd"]})
    write_gallery(store, 1000)
    loaded = Loaded(tmp_path / "out")
    page = (tmp_path / "out" / PAGE).read_text()
    assert "alert" not in page
    assert loaded.rows[3]["prompt"] == HOSTILE[0]
    assert "\x00" not in "".join(loaded.column("prompt"))
    assert [len(loaded.rows[0]["prompt"]), loaded.rows[0]["prompt"][-1]] == [2000, "…"]
    assert HOSTILE[0] in loaded.rows[0]["odd"]


def test_annotations_are_columns(tmp_path: Path) -> None:
    store = rendered(tmp_path, [{"prompt": f"p{n}"} for n in range(8)])
    said = pa.table({"key": ["000010000", "000010002"], "score": [0.25, float("nan")], "note": ["a", None]})
    store.write("annotations/judge/00001.parquet", parquet_bytes(said))
    write_gallery(store, 1000, columns=["judge.score"])
    loaded = Loaded(tmp_path / "out")
    assert loaded.column("judge.score") == [None] * 4 + [0.25, None, None, None]
    assert loaded.column("judge.note")[4:7] == ["a", None, None]
    with pytest.raises(JobError, match=r"--columns judge.scor: no such column.*judge\.score"):
        write_gallery(store, 1000, columns=["judge.scor"])


def test_infinite_numbers_are_numbers(tmp_path: Path) -> None:
    prices = [float("inf"), -float("inf"), float("nan"), 0.5]
    rows = [{"prompt": f'"Infinity", \\" {n} Infinity', "price": price} for n, price in enumerate(prices)]
    store = rendered(tmp_path, rows, prompts={"passthrough": ["price"]})
    write_gallery(store, 100)
    loaded = Loaded(tmp_path / "out")
    assert loaded.column("price") == [float("inf"), -float("inf"), None, 0.5]
    assert loaded.column("prompt") == [row["prompt"] for row in rows]


def test_another_run_stands_beside_by_id(tmp_path: Path) -> None:
    ids = [f"row {n}" for n in range(9)]

    def made(folder: str, names: Sequence[str], steps: int) -> Store:
        rows = [{"prompt": name, "id": name} for name in names]
        return rendered(
            tmp_path / folder, rows, prompts={"columns": {"id": "id"}}, sampling={"num_inference_steps": steps}
        )

    one, other = made("a", ids, 2), made("b", [*reversed(ids), "further"], 3)
    write_gallery(one, 4, beside=other)
    here, beside = Loaded(tmp_path / "a/out"), Loaded(tmp_path / "a/out", "beside")
    assert sorted(beside.column("id")) == here.column("id") == ["row 1", "row 3", "row 5", "row 7"]
    assert (set(here.column("num_inference_steps")), set(beside.column("num_inference_steps"))) == ({2}, {3})
    assert len(beside.images) == len(here.images) == 4
    write_gallery(one, 4)
    assert not [key for key in one.list("_run/gallery") if "beside" in key]
