import hashlib
import io
import re
import tarfile
import uuid
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import numpy as np
import pytest
from PIL import Image

from flux_batch.config.schema import ImageConfig, JobConfig, OutputConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import DamagedObject, JobError, StoreError
from flux_batch.images import AI_SOURCE_TYPE, encode
from flux_batch.job import run
from flux_batch.output.formats import format_for
from flux_batch.report.gallery.content import RunSize, read_file
from flux_batch.report.gallery.page import plain
from flux_batch.report.gallery.rows import GalleryRow
from flux_batch.report.gallery.write import PAGE, SHEET, write_single_file
from flux_batch.report.progress.status import read_status
from flux_batch.storage.store import Store
from helpers.fakes import make_fake_pipeline
from helpers.job_files import data_files, make_job
from helpers.s3 import Bucket

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</figure></div>&lt;b&gt; &amp;",
    "' onload='x",
    "javascript:alert(1)",
    "null \x00 escape \x1b[31m",
    "turned \u202e around",
    "中文 עברית 😀",
    "word " * 3000,
]

OTHER_BYTES = "its bytes differ from those in the metadata"

TAGS = {
    "html",
    "head",
    "main",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "p",
    "a",
    "details",
    "summary",
    "dl",
    "dt",
    "dd",
}
TAGS |= {"bdi", "div", "figure", "img", "figcaption", "table", "tr", "th", "td"}


class Page(HTMLParser):
    """A parsed page: tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def render(folder: Path, rows: list[dict[str, Any]] | None = None, **sections: dict[str, Any]) -> JobConfig:
    config = make_job(folder, rows, **sections)
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    return config


def gallery(config: JobConfig, most: int = 200, columns: Sequence[str] | None = None) -> Page:
    store = Store(config.output.uri, config.output.storage_options)
    write_single_file(store, most, columns)
    return Page(store.read(PAGE).decode())


def prompts(page: Page) -> list[str]:
    """Return the alternative texts of the images on a page."""
    return [str(image["alt"]) for image in page.all("img")]


@pytest.mark.parametrize("layout", ["webdataset", "files", "parquet"])
@pytest.mark.parametrize("image", ["png", "jpeg", "webp"])
def test_every_layout_shows_its_images_with_their_rows(tmp_path: Path, layout: str, image: str) -> None:
    rows = [{"prompt": f"image {number}", "seed": 700 + number} for number in range(10)]
    config = render(tmp_path, rows, output={"format": layout, "image": {"type": image}})
    before = data_files(tmp_path / "out")
    page = gallery(config)

    assert prompts(page) == [f"image {number}" for number in range(10)]
    assert page.open == []
    assert "10 images · none failed · complete" in page.text
    for number in range(10):
        assert f"image {number} seed {700 + number} · 16 x 16 · 2 steps · guidance 3.5" in page.text
    assert data_files(tmp_path / "out") == before
    linked = [tmp_path / "out/_run/gallery" / unquote(str(link["href"])) for link in page.all("a")]
    assert len(linked) == (10 if layout == "files" else 0)
    assert all(path.is_file() for path in linked)
    for attributes in page.all("img"):
        assert attributes["loading"] == "lazy"
        assert str(attributes["src"]).startswith("data:image/webp;base64,")


def test_the_right_image_stands_beside_a_prompt(tmp_path: Path) -> None:
    config = render(tmp_path, output={"format": "webdataset"}, sampling={"width": 32, "height": 16})
    shown = write_single_file(Store(config.output.uri), 4).images

    for each in shown:
        stored = _stored(tmp_path / "out", str(each.row["key"]))
        assert each.thumbnail is not None
        small = np.asarray(Image.open(io.BytesIO(each.thumbnail.data))).astype(int)
        assert (each.thumbnail.width, each.thumbnail.height) == (32, 16)
        # WebP is lossy and the fake images are noise, but each thumbnail is still nearest to its own image.
        assert np.corrcoef(small.mean(2).ravel(), np.asarray(stored).astype(int).mean(2).ravel())[0, 1] > 0.8
        assert AI_SOURCE_TYPE.encode() in each.thumbnail.data


def _stored(output: Path, key: str) -> Image.Image:
    with tarfile.open(output / f"train/{key[:5]}.tar") as tar:
        content = tar.extractfile(f"{key}.png")
        assert content is not None
        return Image.open(io.BytesIO(content.read()))


def test_hostile_rows_stay_text(tmp_path: Path) -> None:
    rows = [{"prompt": text, "id": f"{text[:30]}{number}", "note": text} for number, text in enumerate(HOSTILE)]
    rows += [
        {"prompt": f"[raise] {text}", "id": f"failed {number}", "note": text} for number, text in enumerate(HOSTILE)
    ]
    page = gallery(render(tmp_path, rows, prompts={"passthrough": ["note"]}, failures={"max_ratio": 1.0}))

    assert {tag for tag, _ in page.tags} == TAGS
    assert page.open == []
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert [link["href"] for link in page.all("a")] == ["#failed"]
    assert "<script>alert(1)</script> seed" in page.text
    assert "null \ufffd escape \ufffd[31m" in page.text
    assert f"{len(HOSTILE) + 1} failed" in page.text  # a prompt with NUL fails
    assert "RuntimeError" in page.text
    assert "asked to fail" in page.text
    assert len(page.text) < 20_000
    assert "default-src 'none'" in str(page.all("meta")[2]["content"])


def test_the_end_of_a_line_in_windows_is_one(tmp_path: Path) -> None:
    assert plain("one\r\ntwo\rthree\n") == "one\ntwo\ufffdthree\n"
    page = gallery(render(tmp_path, [{"prompt": "one\r\ntwo"}]))
    assert "\ufffd" not in page.text


def test_a_file_name_in_the_rows_reaches_no_other_file(tmp_path: Path) -> None:
    secret = encode(np.zeros((16, 16, 3), np.uint8), ImageConfig(), {})
    (tmp_path / "secret.png").write_bytes(secret)
    store = Store(str(tmp_path / "out"))
    output_format = format_for(OutputConfig(uri="x"))
    row = {"key": "1", "sha256": hashlib.sha256(secret).hexdigest(), "bytes": len(secret)}
    for name in ("../secret.png", "train/../../secret.png", str(tmp_path / "secret.png"), "javascript:alert(1)"):
        (shown,) = read_file(store, output_format, [GalleryRow(row | {"file_name": name})])
        assert shown.thumbnail is None
        assert "damaged" in shown.problem


def test_columns_that_differ_stand_under_each_image_and_the_others_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "kind": "ab"[number % 2], "same": 3.25} for number in range(4)]
    config = render(tmp_path, rows, prompts={"passthrough": ["kind", "same"]})
    page = gallery(config)
    assert page.text.count("kind a ") == 2
    assert page.text.count("same 3.25") == 1
    assert page.text.index("same 3.25") < page.text.index("p0 seed")
    assert "sha256" not in page.text

    assert gallery(config, columns=["same", "model"]).text.count("same 3.25 model demo") == 4
    assert "kind" not in gallery(config, columns=[]).text
    with pytest.raises(JobError, match=r"--columns colour: no such column.*kind"):
        gallery(config, columns=["kind", "colour"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["webdataset", "files", "parquet"])
def test_a_sample_of_many_images_is_spread_over_the_run(tmp_path: Path, layout: str) -> None:
    rows = [{"prompt": f"[raise] {number}" if number % 10 == 3 else f"p{number}"} for number in range(40)]
    config = render(tmp_path, rows, output={"format": layout}, failures={"max_ratio": 1.0})
    page = gallery(config, 6)

    shown = [int(prompt[1:]) for prompt in prompts(page)]
    gaps = [after - before for before, after in pairwise(shown)]
    assert (len(shown), shown[0] < 7, shown[-1] >= 33, min(gaps) >= 5, max(gaps) <= 9) == (6, True, True, True, True)
    assert "6 of 36 images, evenly spread over the run · 4 failed" in page.text
    assert len(prompts(gallery(config, 35))) == 35
    assert len(prompts(gallery(config, 36))) == 36
    for number in (0, 2001):
        with pytest.raises(JobError, match=f"--max-images {number}: must be from 1 to 2000"):
            gallery(config, number)


def test_failures_beyond_the_first_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux_batch.report.gallery.content.MAX_FAILED", 5)
    page = gallery(
        render(tmp_path, [{"prompt": f"[raise] {number}"} for number in range(9)], failures={"max_ratio": 1.0})
    )
    assert "9 failed, the first 5" in page.text
    assert len(page.all("tr")) == 6
    assert prompts(page) == []


def test_a_run_in_progress_shows_what_is_committed(tmp_path: Path) -> None:
    config = render(tmp_path)
    out = tmp_path / "out"
    (out / "_SUCCESS").unlink()
    (out / "_run/commits/00001.json").unlink()
    page = gallery(config)
    assert [prompt[-1] for prompt in prompts(page)] == list("012389")
    assert "2 of 3 shards committed" in page.text
    for commit in (out / "_run/commits").iterdir():
        commit.unlink()
    assert "0 images" in gallery(config).text
    assert read_status(Store(str(out)))["num_committed"] == 0


# The message on images of a damaged file, by layout; other layouts have the message of single files.
HARMS = {
    "gone": {"files": "{} is missing"},
    "cut": {"files": OTHER_BYTES, "webdataset": "it is not in {}", "parquet": "{} is damaged (ArrowInvalid)"},
    "other": {"files": OTHER_BYTES, "webdataset": "it is not in {}", "parquet": "{} is damaged (ArrowInvalid)"},
    "empty": {
        "files": OTHER_BYTES,
        "webdataset": "{} is damaged (ReadError)",
        "parquet": "{} is damaged (ArrowInvalid)",
    },
}


@pytest.mark.parametrize("layout", ["webdataset", "files", "parquet"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_missing_or_damaged_file_is_a_note_and_the_rest_is_shown(tmp_path: Path, layout: str, harm: str) -> None:
    config = render(tmp_path, output={"format": layout})
    victim = {"webdataset": "00001.tar", "files": "00001/000010002.png", "parquet": "00001.parquet"}[layout]
    path = tmp_path / "out/train" / victim
    whole = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        damaged = {"cut": whole[: len(whole) // 2], "other": bytes(len(whole)), "empty": b""}
        path.write_bytes(damaged[harm])
    page = gallery(config)
    notes = re.findall(r"No image: (.*?)(?: image \d)", page.text)
    assert len(prompts(page)) + len(notes) == 10
    assert 1 <= len(notes) <= (1 if layout == "files" else 4)
    assert set(notes) == {HARMS[harm].get(layout, HARMS[harm]["files"]).format(f"train/{victim}")}
    assert "image 6" in page.text


def test_other_bytes_than_recorded_are_not_shown(tmp_path: Path) -> None:
    config = render(tmp_path, output={"format": "files"})
    (tmp_path / "out/train/00000/000000001.png").write_bytes((tmp_path / "out/train/00000/000000002.png").read_bytes())
    page = gallery(config)
    assert len(prompts(page)) == 9
    assert "No image: its bytes differ from those in the metadata image 1" in page.text


@pytest.mark.parametrize("data", [None, b"no table"])
def test_a_shard_without_metadata_is_a_note(tmp_path: Path, data: bytes | None) -> None:
    config = render(
        tmp_path, [{"prompt": f"[raise] {n}" if n == 5 else f"p{n}"} for n in range(8)], failures={"max_ratio": 1.0}
    )
    for key in ("metadata/00001.parquet", "_run/failed/00001.parquet"):
        (tmp_path / "out" / key).unlink() if data is None else (tmp_path / "out" / key).write_bytes(data)
    page = gallery(config)
    assert prompts(page) == ["p0", "p1", "p2", "p3"]
    word = "missing" if data is None else "damaged"
    assert page.text.count(f"No image: metadata/00001.parquet is {word}") == 3
    assert f"_run/failed/00001.parquet is {word}" in page.text


def test_a_storage_outage_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = render(tmp_path)

    def away(*_: Any) -> bytes:
        raise StoreError("the store is away")

    monkeypatch.setattr(Store, "read_range", away)
    with pytest.raises(StoreError, match="away"):
        gallery(config)
    assert not (tmp_path / "out/_run/gallery").exists()


def test_no_run_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="there is no run here"):
        write_single_file(Store(str(tmp_path / "out")), 10)
    assert not (tmp_path / "out").exists()
    config = render(tmp_path)
    (tmp_path / "out/_run/plan.parquet").write_bytes(b"no table")
    with pytest.raises(DamagedObject, match="damaged"):
        gallery(config)


def test_the_same_run_gives_the_same_page_and_it_is_replaced(tmp_path: Path) -> None:
    config = render(tmp_path)
    page, sheet = (tmp_path / "out" / PAGE, tmp_path / "out" / SHEET)
    gallery(config)
    first = (page.read_bytes(), sheet.read_bytes())
    gallery(config, 3)
    assert page.read_bytes() != first[0]
    gallery(config)
    assert (page.read_bytes(), sheet.read_bytes()) == first
    assert sorted(path.name for path in page.parent.iterdir()) == ["contact-sheet.jpg", "index.html"]
    assert run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline).num_new_images == 0


@pytest.mark.s3
@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_a_bucket_serves_the_page_as_a_page(tmp_path: Path, s3_store: Bucket, layout: str) -> None:
    output = {"uri": f"{s3_store.uri}/run", "storage_options": s3_store.storage_options, "format": layout}
    config = render(tmp_path, output=output)
    assert len(prompts(gallery(config, 5))) == 5
    fs, path = fsspec.url_to_fs(f"{s3_store.uri}/run/{PAGE}", **s3_store.storage_options)
    assert fs.info(path)["ContentType"].startswith("text/html")

    store = Store(config.output.uri, config.output.storage_options)
    for key in store.list("train"):
        store.write(key, b"")
    assert gallery(config, 5).text.count("No image: ") == 5


@pytest.mark.parametrize("layout", ["webdataset", "files", "parquet"])
def test_a_run_on_another_store(tmp_path: Path, layout: str) -> None:
    output = {"uri": f"memory://{uuid.uuid4().hex}/run", "format": layout}
    assert len(prompts(gallery(render(tmp_path, output=output), 7))) == 7


def test_values_of_any_type_are_shown(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "odd": [None, [1, 2], []][number]} for number in range(3)]
    page = gallery(render(tmp_path, rows, prompts={"passthrough": ["odd"]}))
    assert re.findall(r"odd (\[[^\]]*\])", page.text) == ["[1, 2]", "[]"]


def test_one_image_is_one_image() -> None:
    size = RunSize(name="cats", num_images=1, num_failed=0, num_committed=1, num_shards=1, is_complete=True)
    assert size.summary(1) == "cats: 1 image, 0 failed; complete"
