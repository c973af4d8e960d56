"""Exports: copies of the images with their metadata, in any format, after any kill."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flux_batch.config.schema import ImageConfig
from flux_batch.dataset.export.export import export
from flux_batch.dataset.select.select import Criteria, select
from flux_batch.dataset.select.selection import read_selection
from flux_batch.errors import JobError, StoreError
from flux_batch.images import AI_SOURCE_TYPE, encode, read_provenance
from flux_batch.output.paths import JOB, REPORT
from flux_batch.storage.store import Store
from helpers.annotated import put_annotations
from helpers.finished_runs import command, finish
from helpers.hub_bucket import hub_bucket
from helpers.job_files import make_job, metadata

# `datasets` and `webdataset` leave files open.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"),
]
NUM_ROWS = 13
FAILED = 5
COLUMNS = pa.schema([("similarity", pa.float32()), ("label", pa.string()), ("embedding", pa.list_(pa.float16(), 2))])


def number_of(key: str) -> int:
    return int(key[:5]) * 4 + int(key[5:])


def made_run(folder: Path, layout: str) -> Store:
    """Make a run of 12 images, all annotated except the third, with a selection in two splits."""
    rows = [
        {"prompt": f"image {number}" + (" [raise]" if number == FAILED else ""), "seed_": f"note {number}"}
        for number in range(NUM_ROWS)
    ]
    prompts = {"passthrough": ["seed_"]}
    config = make_job(folder, rows, prompts=prompts, output={"format": layout}, failures={"max_ratio": 1.0})
    finish(config)
    store = Store(config.output.uri)

    def judge(row: Any) -> dict[str, Any] | None:
        number = number_of(row["key"])
        return None if number == 2 else {"similarity": number / 4, "label": f"l{number}", "embedding": [number, 0.5]}

    put_annotations(store, "clip", COLUMNS, judge)
    table = {"key": [f"{number // 4:05d}{number % 4:04d}" for number in (0, 1, 2, 3, 4, 6, 12)]}
    (folder / "keys.json").write_text(json.dumps(table["key"]))
    return store


def rows_of(dest: Path, format: str) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """Yield split, record and image of each image of an export, without the package."""
    if format == "lance":
        lance = pytest.importorskip("lance")
        for path in sorted(dest.glob("*.lance")):
            yield from ((path.stem, row, row.pop("image")) for row in lance.dataset(str(path)).to_table().to_pylist())
    for path in sorted([*dest.glob("*/*.tar"), *dest.glob("*/*.parquet"), *dest.glob("*/*/metadata.parquet")]):
        split = path.relative_to(dest).parts[0]
        if format == "webdataset":
            with tarfile.open(path) as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            keys = dict.fromkeys(name.partition(".")[0] for name in members)
            assert len(members) == 3 * len(keys)
            for key in keys:
                yield split, json.loads(members[f"{key}.json"]), members[f"{key}.png"]
        elif format == "parquet":
            yield from ((split, row, row.pop("image")["bytes"]) for row in pq.read_table(path).to_pylist())
        else:
            for row in pq.read_table(path).to_pylist():
                yield split, row, (path.parent / row.pop("file_name")).read_bytes()


@pytest.mark.parametrize(
    ("layout", "format"),
    [("webdataset", "parquet"), ("files", "webdataset"), ("parquet", "files"), ("parquet", "lance")],
)
def test_an_export_has_the_images_their_records_and_annotations(
    tmp_path: Path, layout: str, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store, dest = made_run(tmp_path, layout), tmp_path / "dest"
    split = ["--keys", str(tmp_path / "keys.json"), "--split", "train=0.6,test=0.4"]
    assert command(capsys, "select", store.uri, "some", *split)[0] == 0
    selection = read_selection(store, "some").to_pydict()
    splits = dict(zip(selection["key"], selection["split"], strict=True))
    arguments = ["export", store.uri, str(dest), "--selection", "some", "--format", format, "--shard-size", "2"]
    code, said = command(capsys, *arguments, "--json")
    figures = json.loads(said)
    assert (code, figures["num_new_shards"], sum(figures["splits"].values())) == (0, figures["num_shards"], 7)

    truth = {row["key"]: row for row in pa.concat_tables(read_metadata(store)).to_pylist()}
    found = list(rows_of(dest, format))
    assert [row["key"] for split, row, _ in sorted(found, key=lambda each: each[1]["key"])] == sorted(splits)
    for split_name, row, image in found:
        original = truth[row["key"]]
        assert splits[row["key"]] == split_name
        assert hashlib.sha256(image).hexdigest() == original["sha256"] == row["sha256"]
        assert (row["prompt"], row["seed"], row["seed__"]) == (original["prompt"], original["seed"], original["seed__"])
        number = number_of(row["key"])
        nulls = (0.0, "", []) if format == "webdataset" else (None, None, None)
        judged = nulls if number == 2 else (number / 4, f"l{number}", [float(number), 0.5])
        assert (row["clip_similarity"], row["clip_label"], row["clip_embedding"]) == judged
    before = {path: path.read_bytes() for path in sorted(dest.rglob("*")) if path.is_file()}
    assert json.loads(command(capsys, *arguments, "--json")[1])["num_new_shards"] == 0
    assert {path: path.read_bytes() for path in sorted(dest.rglob("*")) if path.is_file()} == before
    code, said = command(capsys, *arguments[:-1], "3")
    assert (code, "shard_size is 2 there, 3 here" in said) == (2, True)
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(dest), cache_dir=str(tmp_path / "cache"))
    assert {name: table.num_rows for name, table in loaded.items()} == figures["splits"]


@pytest.mark.parametrize("format", ["webdataset", "files", "parquet"])
def test_a_time_that_python_cannot_hold_is_exported_as_it_is(tmp_path: Path, format: Any) -> None:
    config = make_job(tmp_path, prompts={"passthrough": ["day", "at"]}, output={"format": format})
    days = pa.array([5_000_000, None], pa.date32())  # the year 15659
    moments = pa.array([1, 2], pa.timestamp("ns"))
    pq.write_table(pa.table({"prompt": ["a", "b"], "day": days, "at": moments}), tmp_path / "prompts.parquet")
    finish(config)

    export(Store(config.output.uri), Store(str(tmp_path / "dest")), format=format)

    if format == "webdataset":
        made, exported = (tmp_path / name / "train/00000.tar" for name in ("out", "dest"))
        assert made.read_bytes() == exported.read_bytes()
    else:
        name = "train/00000/metadata.parquet" if format == "files" else "train/00000.parquet"
        table = pq.read_table(tmp_path / "dest" / name, columns=["day", "at"])
        assert (table["day"].combine_chunks(), table["at"].combine_chunks()) == (days, moments)


def test_images_that_were_made_again_are_another_export(tmp_path: Path) -> None:
    dest = Store(str(tmp_path / "dest"))
    for seed in (0, 1):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        config = make_job(tmp_path, sampling={"seed": seed})
        finish(config)
        if seed == 0:
            assert export(Store(config.output.uri), dest).num_new_shards == 1
    made = {path: path.read_bytes() for path in tmp_path.glob("dest/**/*") if path.is_file()}
    with pytest.raises(JobError, match=r"holds another export: the images are others, or were made again; take"):
        export(Store(config.output.uri), dest)
    assert {path: path.read_bytes() for path in tmp_path.glob("dest/**/*") if path.is_file()} == made


def test_images_that_were_annotated_again_are_another_export(tmp_path: Path) -> None:
    store, dest, some = made_run(tmp_path, "parquet"), Store(str(tmp_path / "dest")), Store(str(tmp_path / "some"))
    (tmp_path / "keys.json").write_text(json.dumps(["000000000", "000000003"]))
    select(store, "first", Criteria(keys=str(tmp_path / "keys.json")))
    columns = pa.schema([("score", pa.int32())])
    for _ in range(2):  # the second time with the same values
        put_annotations(store, "score", columns, lambda row: {"score": 1})
        export(store, dest)
        export(store, some, selection="first")
    put_annotations(store, "score", columns, lambda row: {"score": 1 if row["key"] < "00001" else 2})
    with pytest.raises(JobError, match=r"another export: the annotations 'score' are others, or were made again; take"):
        export(store, dest)
    assert export(store, some, selection="first").num_new_shards == 0  # the first shard has the whole selection


def test_an_export_that_knows_no_bytes_is_another_one(tmp_path: Path) -> None:
    store, dest = made_run(tmp_path, "parquet"), Store(str(tmp_path / "dest"))
    export(store, dest)
    identity = json.loads(dest.read("_export/export.json")) | {"version": 1, "images": "0" * 32}
    identity.pop("annotations", None)
    dest.write("_export/export.json", json.dumps(identity).encode())
    said = (
        r"dest: holds another export: it was begun by another version of this program \(1 in its description, "
        r"2 here\), so its images and annotations cannot be compared; take another address, or remove that one$"
    )
    with pytest.raises(JobError, match=said):
        export(store, dest)


@pytest.mark.parametrize("format", ["files", "parquet"])
def test_what_a_killed_export_has_written_otherwise_is_replaced(tmp_path: Path, format: Any) -> None:
    # The files differ as if written by another version of pyarrow or Pillow.
    store, dest = made_run(tmp_path, "webdataset"), tmp_path / "dest"
    export(store, Store(str(dest)), format=format, shard_size=4)
    files = sorted(path for path in dest.glob("train/**/*") if path.is_file())
    whole = [path.read_bytes() for path in files]
    for commit in dest.glob("_export/commits/*"):
        commit.unlink()
    files[0].write_bytes(b"x" * len(whole[0]))
    files[1].write_bytes(whole[1] + b"x")
    left = files[2].stat().st_ino
    assert export(store, Store(str(dest)), format=format, shard_size=4).num_new_shards == 3
    assert [path.read_bytes() for path in files] == whole
    assert files[2].stat().st_ino == left


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x")])
def test_a_file_that_is_not_as_it_was_written_is_mended_as_the_sentence_says(
    tmp_path: Path, change: Callable[[Path], Any]
) -> None:
    store, dest = made_run(tmp_path, "webdataset"), tmp_path / "dest"
    export(store, Store(str(dest)), shard_size=4)
    shard = dest / "train/00001.tar"
    data = shard.read_bytes()
    change(shard)
    commit = dest / "_export/commits/train-00001.json"
    with pytest.raises(StoreError, match=f"00001.tar: is not as it was written; remove {commit} and run the same"):
        export(store, Store(str(dest)), shard_size=4)
    commit.unlink()
    assert export(store, Store(str(dest)), shard_size=4).num_new_shards == 1
    assert shard.read_bytes() == data


def read_metadata(store: Store) -> list[pa.Table]:
    return [pq.read_table(io.BytesIO(store.read(key))) for key in store.list("metadata")]


class Killed(BaseException):
    """The simulated end of a process after a write."""


@pytest.mark.parametrize("format", ["webdataset", "files", "parquet", "lance"])
def test_a_killed_export_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made_run(tmp_path, "webdataset")
    whole, dest = tmp_path / "whole", tmp_path / "dest"
    export(store, Store(str(whole)), format=format, shard_size=3)
    left = 0

    def mortal(write: Callable[..., None]) -> Callable[..., None]:
        def write_or_die(self: Store, key: str, data: bytes | Path) -> None:
            nonlocal left
            write(self, key, data)
            left -= 1
            if left <= 0:
                raise Killed

        return write_or_die

    for name in ("write", "put_if_absent"):
        monkeypatch.setattr(Store, name, mortal(getattr(Store, name)))
    for _ in range(40):
        left = 7
        try:
            export(store, Store(str(dest)), format=format, shard_size=3)
        except Killed:
            continue
        break
    monkeypatch.undo()
    files = [
        {
            path.relative_to(folder): path.read_bytes().replace(str(folder).encode(), b"")
            for path in sorted(folder.rglob("*"))
            # Lance stores times in its versions.
            if path.is_file() and path.parent.name not in ("_versions", "_transactions")
        }
        for folder in (whole, dest)
    ]
    assert files[0] == files[1]
    assert [*rows_of(whole, format)] == [*rows_of(dest, format)]
    assert Path("_SUCCESS") in files[0]


def test_a_bucket_of_the_hub_is_an_address_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = hub_bucket(monkeypatch)
    arguments = ["export", made_run(tmp_path, "files").uri, "hf://buckets/owner/name/set", "--format", "webdataset"]

    code, said = command(capsys, *arguments)
    made = {path: data for path, data in files.items() if path.startswith("set/train/")}
    assert (code, "found written already" in said) == (0, False)
    assert "1 of them found written already" in command(capsys, *arguments)[1]
    assert {path: data for path, data in files.items() if path.startswith("set/train/")} == made
    with tarfile.open(fileobj=io.BytesIO(made["set/train/00000.tar"])) as shard:
        assert len([name for name in shard.getnames() if name.endswith(".png")]) == NUM_ROWS - 1


def test_copies_may_be_smaller_and_keep_their_label(tmp_path: Path) -> None:
    store = made_run(tmp_path, "files")
    export(store, Store(str(tmp_path / "dest")), format="parquet", max_side=16)
    originals = {row["sha256"] for row in pa.concat_tables(read_metadata(store)).to_pylist()}
    assert {row["sha256"] for _, row, _ in rows_of(tmp_path / "dest", "parquet")} < originals
    # Images of 16 x 16 keep their size; a larger image is resized.
    config = make_job(tmp_path / "large", [{"prompt": "one", "width": 64, "height": 32}])
    finish(config)
    dest = tmp_path / "small"
    export(Store(config.output.uri), Store(str(dest)), format="parquet", max_side=20)
    ((_, row, data),) = rows_of(dest, "parquet")
    with Image.open(io.BytesIO(data)) as image:
        assert (image.size, image.format, AI_SOURCE_TYPE in str(image.info)) == ((20, 10), "PNG", True)
    size = (row["width"], row["height"], row["stored_width"], row["stored_height"], row["bytes"])
    assert size == (64, 32, 20, 10, len(data))
    assert read_provenance(data)["prompt"] == "one"
    assert metadata(config)[0]["sha256"] != row["sha256"]


def mark(data: bytes, record: Mapping[str, Any]) -> bytes:
    """Turn the first pixel red."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(image)
    pixels[0, 0] = (255, 0, 0)
    return encode(pixels, ImageConfig(), {"prompt": record["prompt"], "model": record["model"]})


def strip(data: bytes, record: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_last_hand_on_every_image_keeps_the_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hands", SimpleNamespace(mark=mark, strip=strip))
    store = made_run(tmp_path, "parquet")
    export(store, Store(str(tmp_path / "dest")), format="files", finish="hands:mark")
    for _, row, data in rows_of(tmp_path / "dest", "files"):
        with Image.open(io.BytesIO(data)) as image:
            assert image.getpixel((0, 0)) == (255, 0, 0)
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
    for hand, sentence in (
        ("hands:strip", "image 000000000: has lost its AI label"),
        ("hands:none", "must be MODULE:FUNCTION"),
        ("nowhere", "must be MODULE:FUNCTION"),
    ):
        with pytest.raises(JobError, match=sentence):
            export(store, Store(str(tmp_path / "other")), finish=hand)


def test_other_readers_open_an_export(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    store = made_run(tmp_path, "webdataset")
    for format in ("webdataset", "parquet"):
        export(store, Store(str(tmp_path / format)), format=format, shard_size=5)
    tars = sorted(str(path) for path in (tmp_path / "webdataset/train").glob("*.tar"))
    rows = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("png", "txt", "json"))
    assert [text for _, text, _ in rows] == [f"image {number}" for number in range(NUM_ROWS) if number != FAILED]
    query = f"SELECT count(*), max(clip_similarity), count(image.bytes) FROM '{tmp_path}/parquet/train/*.parquet'"
    assert duckdb.sql(query).fetchall() == [(12, 3.0, 12)]


def test_the_card_says_what_is_known(tmp_path: Path) -> None:
    store = made_run(tmp_path, "webdataset")
    dest = tmp_path / "dest"
    export(store, Store(str(dest)), format="parquet", shard_size=5, licence="cc-by-4.0")
    card = (dest / "README.md").read_text()
    for text in (
        'license: "cc-by-4.0"',
        '{"split": "train", "path": "train/*.parquet"}',
        'size_categories: ["n<1K"]',
        "The run asked for 13 images and made 12 of them; 1 failed:",
        "| `RuntimeError` | 1 |",
        "| `clip_similarity` | float | `similarity` of the annotation `clip` |",
        "| `seed__` | string | a column of the prompts |",
        "| `clip_similarity` | 11 | 0.125 |",
        f'load_dataset("{dest}", split="train")',
        "FLUX.1-dev's does",
    ):
        assert text in card
    assert card.count("```python") == 4
    for language, block in ((each.partition("\n")[0], each.partition("\n")[2]) for each in card.split("```")[1::2]):
        assert language in ("python", "json")
        if language == "python":
            compile(block, "card", "exec")


def test_the_card_names_the_dtype_that_the_run_computed_in(tmp_path: Path) -> None:
    store = made_run(tmp_path, "webdataset")
    assert store.read(JOB).count(b"auto")
    report = json.loads(store.read(REPORT))
    report["model"]["dtype"] = "bfloat16"
    store.write(REPORT, json.dumps(report).encode())

    export(store, Store(str(tmp_path / "dest")))

    assert f"| model | {report['model']['uri']} (bfloat16) |" in (tmp_path / "dest/README.md").read_text()


def test_the_card_has_scores_that_are_all_but_equal_or_far_apart(tmp_path: Path) -> None:
    store = made_run(tmp_path, "webdataset")
    columns = pa.schema([("sure", pa.float64()), ("far", pa.float64()), ("endless", pa.float64())])

    def judge(row: Any) -> dict[str, Any]:
        is_odd = number_of(row["key"]) % 2
        return {
            "sure": 1.0 if is_odd else 1.0 - 2**-53,
            "far": 1e308 if is_odd else -1e308,
            "endless": float("inf") if is_odd else 2.0,
        }

    put_annotations(store, "judge", columns, judge)
    export(store, Store(str(tmp_path / "dest")), format="parquet")
    card = (tmp_path / "dest/README.md").read_text()
    # 5 of the 12 images have odd numbers, since the failed row also has an odd number.
    assert f"| `judge_sure` | 12 | 1 | 1 | 1 | 1 ... 1 | `█{' ' * 18}▆` |" in card
    assert f"| `judge_far` | 12 | -1e+308 | -1e+308 | 1e+308 | -1e+308 ... 1e+308 | `█{' ' * 18}▆` |" in card
    assert f"| `judge_endless` | 7 | 2 | 2 | 2 | 2 ... 2 | `█{' ' * 19}` |" in card


def test_what_cannot_be_exported_is_a_sentence(tmp_path: Path) -> None:
    store = made_run(tmp_path, "webdataset")
    dest = Store(str(tmp_path / "dest"))
    for options, sentence in (
        ({"selection": "none"}, "there is no selection 'none'"),
        ({"shard_size": 0}, "--shard-size 0"),
        ({"max_side": 3}, "--max-side 3"),
    ):
        with pytest.raises(JobError, match=sentence):
            export(store, dest, **options)  # type: ignore[arg-type]
    with pytest.raises(JobError, match="is the output of a run"):
        export(store, store)
    with pytest.raises(JobError, match="lies among the files of the run"):
        export(store, Store(f"{store.uri}/train/mine"))
    tar = tmp_path / "out/train/00002.tar"
    tar.write_bytes(tar.read_bytes().replace(b"IHDR", b"IHDX", 1))
    with pytest.raises(StoreError, match=r"image 000020000 differ from its metadata \(sha256\)"):
        export(store, dest)
    assert not dest.exists("_SUCCESS")


@pytest.mark.parametrize("name", ["README.md", "train/00000.tar", "train/mine/notes.txt"])
def test_an_export_writes_over_no_file_of_others(tmp_path: Path, name: str) -> None:
    store, mine = made_run(tmp_path, "webdataset"), tmp_path / "dest" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(JobError, match=f"holds {name}, but no export; use an empty folder"):
        export(store, Store(str(tmp_path / "dest")))
    assert [path for path in (tmp_path / "dest").rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "mine"


def test_an_export_says_what_another_one_lacks(tmp_path: Path) -> None:
    store, dest = made_run(tmp_path, "webdataset"), Store(str(tmp_path / "dest"))
    export(store, dest)
    with pytest.raises(
        JobError, match="max_side is none there, 64 here, the columns 'stored_height', 'stored_width' are others; take"
    ):
        export(store, dest, max_side=64)
