from __future__ import annotations

import hashlib
import io
import itertools
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flux_batch.config.schema import ImageConfig, OutputConfig
from flux_batch.errors import DamagedObject, FluxBatchError, NotFound
from flux_batch.images import encode
from flux_batch.output.commits import Commits, Publisher
from flux_batch.output.formats import format_for, iter_images
from flux_batch.output.metadata import unpack_metadata
from flux_batch.output.paths import RunFolder, image_key
from flux_batch.output.revert import remove_shard
from flux_batch.records import Commit, ImageRecord, StoredFile
from flux_batch.sampling_params import SamplingParams
from flux_batch.storage.store import Store
from helpers.fakes import fake_image

FORMATS = ["webdataset", "files", "parquet"]
PASSTHROUGH = pa.schema([("Schlüssel", pa.string())])
PROMPTS = ["a cat", "猫 🐈‍⬛", "[fails]", "a dog"]


class Crash(Exception):
    """The simulated death of a worker between two writes."""


class FragileStore(Store):
    """A store whose user dies before write number `last`."""

    def __init__(self, uri: str, last: int) -> None:
        super().__init__(uri)
        self._left = last
        self._turn = threading.Lock()  # images are written in several threads

    def write(self, key: str, data: bytes | Path) -> None:
        self._count()
        super().write(key, data)

    def put_if_absent(self, key: str, data: bytes | Path) -> None:
        self._count()
        super().put_if_absent(key, data)

    def _count(self) -> None:
        with self._turn:
            if self._left == 0:
                raise Crash
            self._left -= 1


class Attempt:
    """One worker's attempt at the shard of PROMPTS, with its own scratch folder, rounding and failures."""

    def __init__(self, folder: Path, layout: str, *, rounding: int = 0, fails: Sequence[str] = ("[fails]",)) -> None:
        self.scratch = folder
        self.output = OutputConfig(uri="x", format=layout, image=ImageConfig())  # type: ignore[arg-type]
        self.layout = format_for(self.output, PASSTHROUGH)
        folder.mkdir(parents=True)
        self.records: list[ImageRecord] = []
        self.images: dict[str, Path] = {}
        for row, prompt in enumerate(PROMPTS):
            self._make(row, prompt, rounding, prompt in fails)

    def publish(self, store: Store, worker: str = "host:1") -> Commit:
        publisher = Publisher(Commits(RunFolder(store, 1)), self.layout, PASSTHROUGH, worker)
        return publisher.publish(0, self.records, self.images, self.scratch)

    def _make(self, row: int, prompt: str, rounding: int, fails: bool) -> None:
        key = image_key("00000", row, 0)
        record = ImageRecord(
            key=key,
            id=str(row),
            image_index=0,
            prompt=prompt,
            seed=row,
            sampling=SamplingParams(width=32, height=16),
            model="demo",
            status="failed",
            error_type="RuntimeError",
            error_message="asked to fail",
            passthrough={"Schlüssel": f"ü{row}"},
        )
        if not fails:
            data = encode(fake_image(prompt, seed=row + rounding, width=32, height=16), self.output.image, {"key": key})
            path = self.scratch / key
            path.write_bytes(data)
            self.images[key] = path
            record = replace(
                record,
                status="success",
                error_type=None,
                error_message=None,
                file_name=self.layout.file_name("00000", key),
                sha256=hashlib.sha256(data).hexdigest(),
                bytes=len(data),
            )
        self.records.append(record)


def files_of(store: Store, *folders: str) -> dict[str, bytes]:
    return {key: store.read(key) for folder in folders for key in store.list(folder)}


def check_consistent(store: Store, layout: str) -> list[dict[str, Any]]:
    """Read the files of the only commit and check all its fields. Returns: the metadata rows."""
    commits = Commits(RunFolder(store, 1))
    assert commits.done() == {0}
    commit = commits.read(0)
    listed = {file.path for file in commit.files}
    for file in commit.files:
        data = store.read(file.path)
        assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert listed == set(store.list("train")) | set(store.list("metadata"))
    rows = unpack_metadata(store.read("metadata/00000.parquet"))
    assert [row["prompt"] for row in rows] == PROMPTS
    made: dict[str, bytes] = {}
    if data_files := {key: Path(store.uri, key) for key in store.list("train")}:
        chosen = format_for(OutputConfig(uri="x", format=layout), PASSTHROUGH)  # type: ignore[arg-type]
        made = dict(iter_images(chosen, "00000", data_files))
    for row in rows:
        if row["status"] == "success":
            assert row["sha256"] == hashlib.sha256(made[row["key"]]).hexdigest()
            assert row["bytes"] == len(made[row["key"]])
            assert row["file_name"] in listed
        else:
            assert row["error_type"]
            assert row["file_name"] is row["sha256"] is row["bytes"] is None
    assert set(made) == {row["key"] for row in rows if row["status"] == "success"}
    assert commit.num_images == len(rows)
    assert commit.num_failed == sum(row["status"] == "failed" for row in rows)
    failed = [row for row in rows if row["status"] == "failed"]
    assert [unpack_metadata(data) for data in files_of(store, "_run/failed").values()] == ([failed] if failed else [])
    if layout == "files" and made:
        listing = pq.read_table(io.BytesIO(store.read("train/00000/metadata.parquet"))).to_pylist()
        assert [(row["file_name"], row["sha256"]) for row in listing] == [
            (f"{row['key']}.png", row["sha256"]) for row in rows if row["status"] == "success"
        ]
    return rows


@pytest.mark.parametrize("layout", FORMATS)
def test_a_published_shard_is_done_and_fits_together(tmp_path: Path, layout: str) -> None:
    store = Store(str(tmp_path / "out"))
    attempt = Attempt(tmp_path / "a", layout)
    assert Commits(RunFolder(store, 1)).done() == set()

    commit = attempt.publish(store)

    rows = check_consistent(store, layout)
    assert [row["status"] for row in rows] == ["success", "success", "failed", "success"]
    assert [row["Schlüssel"] for row in rows] == ["ü0", "ü1", "ü2", "ü3"]
    assert Commits(RunFolder(store, 1)).read(0) == commit
    assert commit.worker == "host:1"


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("at", ["metadata/00000.parquet", "_run/failed/00000.parquet"])
def test_a_worker_that_slept_while_its_shard_was_reverted_commits_nothing(tmp_path: Path, layout: str, at: str) -> None:
    slept: list[str] = []

    class SleepyStore(Store):
        """A store whose worker sleeps before it writes a file, while another driver reverts the shard."""

        def write(self, key: str, data: bytes | Path) -> None:
            self._sleep_before(key)
            super().write(key, data)

        def put_if_absent(self, key: str, data: bytes | Path) -> None:
            self._sleep_before(key)
            super().put_if_absent(key, data)

        def _sleep_before(self, key: str) -> None:
            if key == at:
                slept.append(key)
                remove_shard(RunFolder(Store(self.uri), 1), attempt.layout, 0)

    store, attempt = SleepyStore(str(tmp_path / "out")), Attempt(tmp_path / "a", layout)
    commits = Commits(RunFolder(store, 1))
    publisher = Publisher(commits, attempt.layout, PASSTHROUGH, "host:1", clock=lambda: 3600.0 * len(slept))

    with pytest.raises(FluxBatchError, match=r"was removed or replaced while this worker was delayed"):
        publisher.publish(0, attempt.records, attempt.images, attempt.scratch)

    assert slept
    assert commits.done() == set()


@pytest.mark.parametrize("layout", FORMATS)
def test_publishing_again_changes_nothing(tmp_path: Path, layout: str) -> None:
    store = Store(str(tmp_path / "out"))
    first = Attempt(tmp_path / "a", layout).publish(store)
    before = files_of(store, "")

    again = Attempt(tmp_path / "b", layout).publish(store, "host:2")

    assert again == first
    assert files_of(store, "") == before


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("rounding", [0, 1])
def test_a_crash_before_any_write_ends_in_what_the_next_attempt_finds_and_makes(
    tmp_path: Path, layout: str, rounding: int
) -> None:
    whole = Store(str(tmp_path / "whole"))
    Attempt(tmp_path / "a", layout).publish(whole)
    expected = files_of(whole, "train", "metadata", "_run/failed")

    crashes = 0
    while True:
        store = Store(str(tmp_path / f"out{crashes}"))
        try:
            Attempt(tmp_path / f"b{crashes}", layout).publish(FragileStore(store.uri, crashes))
        except Crash:
            assert Commits(RunFolder(store, 1)).done() == set()
        else:
            break
        Attempt(tmp_path / f"c{crashes}", layout, rounding=rounding).publish(store, "host:2")
        check_consistent(store, layout)
        if rounding == 0:
            assert files_of(store, "train", "metadata", "_run/failed") == expected
        crashes += 1
    assert crashes == (7 if layout == "files" else 4)


@pytest.mark.parametrize("layout", FORMATS)
def test_the_first_writer_wins_and_the_second_describes_what_it_stored(tmp_path: Path, layout: str) -> None:
    store = Store(str(tmp_path / "out"))
    first = Attempt(tmp_path / "a", layout)
    last = 1 if layout != "files" else 2
    with pytest.raises(Crash):
        first.publish(FragileStore(store.uri, last))
    stored = files_of(store, "train")
    second = Attempt(tmp_path / "b", layout, rounding=1)

    second.publish(store)

    rows = check_consistent(store, layout)
    assert {key: store.read(key) for key in stored} == stored
    ours, theirs = ({record.key: record.sha256 for record in attempt.records} for attempt in (first, second))
    sources = ["first" if row["sha256"] == ours[row["key"]] else "second" for row in rows if row["sha256"]]
    assert sorted(sources) == (["first"] * 3 if layout != "files" else ["first", "first", "second"])
    assert all(row["sha256"] in (ours[row["key"]], theirs[row["key"]]) for row in rows)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("first", "second"), [((), ("[fails]",)), (("[fails]",), ()), ((), tuple(PROMPTS))])
def test_a_row_that_failed_for_one_attempt_alone_has_one_story(
    tmp_path: Path, layout: str, first: Sequence[str], second: Sequence[str]
) -> None:
    store = Store(str(tmp_path / "out"))
    writes = {"files": len(PROMPTS) - len(first)}.get(layout, 1)
    with pytest.raises(Crash):
        Attempt(tmp_path / "a", layout, fails=first).publish(FragileStore(store.uri, writes))

    Attempt(tmp_path / "b", layout, fails=second).publish(store)

    rows = check_consistent(store, layout)
    if not first:
        assert {row["status"] for row in rows} == {"success"}
    elif layout != "files":  # the tar stays without the image
        assert [row["error_type"] for row in rows if row["status"] == "failed"] == ["Superseded"]


def test_a_shard_of_failures_only_has_metadata_and_no_data(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"))

    commit = Attempt(tmp_path / "a", "webdataset", fails=PROMPTS).publish(store)

    assert (commit.num_images, commit.num_failed) == (4, 4)
    assert [file.path for file in commit.files] == ["metadata/00000.parquet"]
    assert store.list("train") == []
    check_consistent(store, "webdataset")


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("ours", "theirs"), [(1, 1), (0, 1), (1, 0), (0, len(PROMPTS)), (len(PROMPTS), 0), (1, len(PROMPTS))]
)
def test_of_two_attempts_in_any_interleaving_one_story_remains(
    tmp_path: Path, layout: str, ours: int, theirs: int
) -> None:
    """A second worker publishes the whole shard between any two writes of the first."""
    fails = {0: (), 1: ("[fails]",), len(PROMPTS): PROMPTS}
    for moment in itertools.count():
        store = Store(str(tmp_path / f"out{moment}"))
        second = Attempt(tmp_path / f"second{moment}", layout, rounding=1, fails=fails[theirs])
        first = Attempt(tmp_path / f"first{moment}", layout, fails=fails[ours])
        interrupted = InterruptedStore(store.uri, moment, partial(second.publish, store, "host:2"))

        commit = first.publish(interrupted)

        check_consistent(store, layout)
        if not interrupted.has_happened:
            assert moment > 1
            break
        assert commit.worker == "host:2"


class InterruptedStore(FragileStore):
    """A store that calls `happen` before write number `last`."""

    def __init__(self, uri: str, last: int, happen: Callable[[], object]) -> None:
        super().__init__(uri, last)
        self._happen = happen
        self.has_happened = False

    def _count(self) -> None:
        with self._turn:
            if self._left == 0:
                self._happen()
                self.has_happened = True
            self._left -= 1


def test_commits_are_counted_and_read_by_their_names(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    commits = Commits(RunFolder(store, 200_000))
    commit = Commit(
        shard=7, worker="w", num_images=1, num_failed=0, files=(StoredFile(path="train/p", bytes=1, sha256="s"),)
    )

    assert commits.put(commit) == commit
    assert commits.put(replace(commit, worker="another")) == commit
    store.write("_run/commits/notes.txt", b"")
    store.write("_run/commits/000009.json.tmp", b"")

    assert store.exists("_run/commits/000007.json")
    assert commits.done() == {7}
    assert list(commits.read_all([7, 7])) == [commit, commit]
    with pytest.raises(NotFound):
        commits.read(8)


def test_commits_are_read_as_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(Commits, "read", lambda self, shard: read.append(shard) or shard)

    found = Commits(RunFolder(Store(str(tmp_path)), 10_000)).read_all(range(10_000))

    assert [next(found), next(found)] == [0, 1]
    assert len(read) < 1000
    assert list(found) == list(range(2, 10_000))


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"null", b"[]", b'{"shard": 1, "files": [{"x": 1}]}', b'{"shard": 1, "files', b"\xff"]
)
def test_a_damaged_commit_is_named(tmp_path: Path, body: bytes) -> None:
    store = Store(str(tmp_path))
    store.write("_run/commits/00001.json", body)

    with pytest.raises(DamagedObject, match=r"00001\.json: not a commit"):
        Commits(RunFolder(store, 2)).read(1)


def test_a_commit_says_its_version(tmp_path: Path) -> None:
    Attempt(tmp_path / "a", "parquet").publish(Store(str(tmp_path / "out")))

    assert json.loads((tmp_path / "out/_run/commits/00000.json").read_text())["version"] == 1
