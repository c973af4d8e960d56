"""Every kind of damage to a run is found, and repaired to the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flux_batch.config.schema import JobConfig
from flux_batch.errors import DamagedObject, JobError, StoreError
from flux_batch.output.lease import Lease
from flux_batch.output.paths import COMMIT_LOG, COMMITS, FAILED, METADATA, TRAIN, metadata_file
from flux_batch.report.saved_run import SavedRun
from flux_batch.report.verify import format_verdict, repair, verify
from flux_batch.storage.store import Store
from helpers.finished_runs import DATA, LAYOUTS, ROWS, Making, command, finish, make_run
from helpers.job_files import data_files, make_job, write_job
from helpers.s3 import Bucket


@pytest.fixture(params=LAYOUTS)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> JobConfig:
    return make_run(tmp_path / "run", request.param)


@pytest.fixture
def store(config: JobConfig) -> Store:
    return Store(config.output.uri)


@pytest.fixture
def webdataset(tmp_path: Path) -> Store:
    return Store(make_run(tmp_path / "run", "webdataset").output.uri)


def texts(store: Store, **options: Any) -> list[tuple[str, int | None, str]]:
    return [(problem.check, problem.shard, problem.text) for problem in verify(store, **options).problems]


# --- a good run


@pytest.mark.parametrize("quick", [False, True])
def test_a_good_run_is_good(store: Store, quick: bool) -> None:
    before = data_files(Path(store.uri))
    verdict = verify(store, quick=quick)

    assert verdict.problems == []
    assert (verdict.exit_code, verdict.is_complete) == (0, True)
    assert (verdict.num_committed, verdict.num_shards) == (3, 3)
    assert (verdict.num_rows, verdict.num_images, verdict.num_failed) == (12, 11, 1)
    assert format_verdict(verdict).endswith("all is well")
    assert re.search(r"^files +\d+ files, [\d.]+ kB +-$", format_verdict(verdict), re.MULTILINE)
    assert data_files(Path(store.uri)) == before


def test_an_unfinished_run_is_good(store: Store) -> None:
    for key in ("_SUCCESS", "_run/commits/00002.json"):
        store.delete(key)
    verdict = verify(store)

    assert verdict.problems == []
    assert verdict.leftovers["uncommitted"] >= 2
    assert "not committed yet: 1 shard" in format_verdict(verdict)


def test_a_quick_look_reads_only_shards_that_are_listed_otherwise_than_logged(
    webdataset: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []
    for name in ("read", "local_file"):
        read = getattr(Store, name)
        monkeypatch.setattr(Store, name, lambda store, key, *to, read=read: keys.append(key) or read(store, key, *to))

    scanned, scan = Counter[str](), Store.scan
    monkeypatch.setattr(
        Store,
        "scan",
        lambda store, folder, *given, **options: scanned.update([folder]) or scan(store, folder, *given, **options),
    )

    def looked_at() -> list[str]:
        keys.clear()
        scanned.clear()
        verdict = verify(webdataset, quick=True)
        assert [scanned[folder] for folder in (COMMITS, TRAIN, METADATA, FAILED)] == [1, 1, 1, 1]
        assert (verdict.num_rows, verdict.num_images, verdict.num_failed, verdict.num_files) == (12, 11, 1, 6)
        return sorted({Path(key).stem for key in keys if key.startswith(("metadata/", "_run/commits/00001"))})

    assert looked_at() == []
    (failed,) = webdataset.list("_run/failed")
    saved = webdataset.read(failed)
    webdataset.delete(failed)
    assert looked_at() == [Path(failed).stem]
    webdataset.write(failed, saved)
    webdataset.delete(COMMIT_LOG)
    assert looked_at() == ["00000", "00001", "00002"]


def test_a_run_in_a_bucket_is_read_too(tmp_path: Path, s3_store: Bucket) -> None:
    output = {"uri": f"{s3_store.uri}/run", "storage_options": s3_store.storage_options, "format": "files"}
    config = make_job(tmp_path, ROWS, output=output, failures={"max_ratio": 1.0})
    finish(config)
    store = Store(config.output.uri, config.output.storage_options)
    assert verify(store).problems == []
    assert verify(store, quick=True).problems == []

    store.write("train/00001/000010000.png", b"x")
    store.write("train/00002/stray", b"x")
    verdict = verify(store, quick=True)
    assert [(problem.check, problem.shard) for problem in verdict.problems] == [("files", 1), ("leftovers", None)]
    assert repair(store, verdict) == [1]
    finish(config)
    assert [problem.text.split(":")[0] for problem in verify(store).problems] == ["train/00002/stray"]


# --- damage to the files of a shard


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "words", "quick_finds"),
    [(cut, "were committed", True), (flip, "sha256", False), (remove, "is missing", True)],
)
def test_damaged_data_is_found_and_repaired_to_the_same_bytes(
    config: JobConfig, store: Store, damage: Callable[[Path], None], words: str, quick_finds: bool
) -> None:
    before = data_files(Path(store.uri))
    file = DATA[config.output.format]
    damage(Path(store.uri, file))
    assert bool(verify(store, quick=True).problems) == quick_finds

    verdict = verify(store)
    assert verdict.exit_code == 3
    assert [(problem.check, problem.shard) for problem in verdict.problems] == [("files", 1)]
    assert file in verdict.problems[0].text
    assert words in verdict.problems[0].text
    assert "shard 1: files: " in format_verdict(verdict)
    assert repair(store, verdict) == [1]
    assert not store.exists("_SUCCESS")
    making = Making()
    finish(config, making)

    assert data_files(Path(store.uri)) == before
    assert verify(store).problems == []
    assert making.prompts.keys() <= {row["prompt"] for row in ROWS[4:8]}


def test_a_repair_keeps_good_images_and_makes_the_others_with_their_neighbours(tmp_path: Path) -> None:
    """An image made alone may differ by a bit from the same image in a batch."""
    config = make_job(tmp_path, ROWS, output={"format": "files"}, workers={"batch_size": 2}, failures={"max_ratio": 1})
    finish(config)
    store, making = Store(config.output.uri), Making()
    before = data_files(Path(store.uri))
    Path(store.uri, "train/00001/000010003.png").unlink()

    repair(store, verify(store))
    finish(config, making)

    calls = [call for pipeline in making.pipelines for call in pipeline.calls]
    assert ["image 6", "image 7"] in calls
    assert not making.prompts.keys() & {"image 0", "image 8"}
    assert data_files(Path(store.uri)) == before
    assert verify(store).problems == []


@pytest.mark.parametrize("config", ["webdataset"], indirect=True)
@pytest.mark.parametrize(("damage", "quick"), [(cut, True), (flip, False), (remove, True)])
def test_damaged_metadata_is_found_and_repaired(
    config: JobConfig, store: Store, damage: Callable[[Path], None], quick: bool
) -> None:
    before = data_files(Path(store.uri))
    damage(Path(store.uri, "metadata/00002.parquet"))

    verdict = verify(store, quick=quick)
    assert [(problem.check, problem.shard) for problem in verdict.problems] == [("files", 2)]
    repair(store, verdict)
    finish(config)
    assert data_files(Path(store.uri)) == before


ELSEWHERE = b"""{"shard": 1, "worker": "w", "num_images": 4, "num_failed": 0,
    "files": [{"path": "train/../../secret", "bytes": 1, "sha256": ""}]}"""


@pytest.mark.parametrize("config", ["files"], indirect=True)
@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b"\xff", b'{"shard": 1}', b"[" * 100_000, ELSEWHERE])
def test_a_damaged_commit_is_found_and_repaired(config: JobConfig, store: Store, body: bytes) -> None:
    before = data_files(Path(store.uri))
    store.write("_run/commits/00001.json", body)

    verdict = verify(store)
    assert [(problem.check, problem.shard) for problem in verdict.problems] == [("commit", 1)]
    repair(store, verdict)
    finish(config)
    assert data_files(Path(store.uri)) == before
    assert verify(store).problems == []


# --- shards that agree with their commits, but not with themselves


def recommit(store: Store, **changes: Any) -> None:
    """Rewrite a commit to match the stored files, as a worker with a bug might have written it."""
    commit = SavedRun.open(store).commits.read(1)

    files = [
        {"path": f.path, "bytes": len(data := store.read(f.path)), "sha256": hashlib.sha256(data).hexdigest()}
        for f in commit.files
        if store.exists(f.path)
    ]
    body = {"version": 1, **asdict(commit), "files": files, **changes}
    store.write("_run/commits/00001.json", json.dumps(body).encode())


def rewrite_rows(store: Store, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    key = metadata_file("00001")
    table = pq.read_table(io.BytesIO(store.read(key)))
    rows = table.to_pylist()
    change(rows)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, table.schema), buffer)
    store.write(key, buffer.getvalue())
    recommit(store, num_images=len(rows), num_failed=sum(row["status"] == "failed" for row in rows))


def set_to(number: int, **fields: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[number].update(fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows.pop(), "has 3 prompts; the plan has 4"),
        (lambda rows: rows.append(rows[0]), "has '000010000' of row 'prompts.parquet:4' in place of 000010004"),
        (lambda rows: rows.reverse(), "has '000010003' of row 'prompts.parquet:7' in place of 000010000"),
        (lambda rows: rows.append(rows[3] | {"image_index": 1}), "in place of 000010003_1"),
        (
            set_to(0, sha256=None),
            "000010000: is a success, but the row lacks file_name train/00001.tar, bytes or sha256",
        ),
        (
            set_to(0, file_name="train/../../x.tar"),
            "000010000: is a success, but the row lacks file_name train/00001.tar",
        ),
        (set_to(1, error_type=None), "000010001: failed, but the row has no error_type"),
        (set_to(0, status="perhaps"), "000010000: has status 'perhaps'"),
    ],
)
def test_rows_that_differ_from_the_plan_are_found(
    webdataset: Store, change: Callable[[list[dict[str, Any]]], Any], words: str
) -> None:
    rewrite_rows(webdataset, change)

    found = texts(webdataset)
    assert [(check, shard) for check, shard, _ in found] == [("rows", 1)]
    assert words in found[0][2]


def test_a_commit_with_other_counts_or_of_another_shard_is_found(webdataset: Store) -> None:
    recommit(webdataset, num_failed=2)
    assert texts(webdataset) == [("rows", 1, "has 4 images, 1 failed; the commit has 4, 2 failed")]
    recommit(webdataset, num_failed=1, shard=2)
    assert texts(webdataset) == [("commit", 1, "belongs to shard 2")]


def test_a_commit_that_does_not_name_its_data_is_found(webdataset: Store) -> None:
    webdataset.delete("train/00001.tar")
    recommit(webdataset)

    assert texts(webdataset) == [("files", 1, "train/00001.tar: is not named by the commit")]


def repack(store: Store, change: Callable[[list[tuple[str, bytes]]], Any]) -> None:
    """Change the members of the tar of shard 1."""
    with tarfile.open(fileobj=io.BytesIO(store.read("train/00001.tar"))) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    change(members)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    store.write("train/00001.tar", buffer.getvalue())
    recommit(store)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda members: members.pop(1), "000010000.txt: is missing"),
        (lambda members: members.append(members[0]), "000010000.png: is there 2 times; it should be 1"),
        (lambda members: members.append(("../evil", b"x")), "../evil: is there 1 times; it should be 0"),
        (lambda members: members.append(("000010001.png", b"x")), "000010001.png: is there 1 times; it should be 0"),
        (
            lambda members: members.__setitem__(0, (members[0][0], b"x")),
            "000010000.png: its bytes differ from the metadata",
        ),
    ],
)
def test_images_that_differ_from_the_metadata_are_found(
    webdataset: Store, change: Callable[[list[tuple[str, bytes]]], Any], words: str
) -> None:
    repack(webdataset, change)

    assert texts(webdataset, quick=True) == []
    found = texts(webdataset)
    assert [(check, shard) for check, shard, _ in found] == [("images", 1)]
    assert words in found[0][2]


def test_an_image_that_cannot_be_decoded_is_found_though_every_hash_agrees(tmp_path: Path) -> None:
    store = Store(make_run(tmp_path, "files").output.uri)
    broken = store.read(DATA["files"])[:-30]
    store.write(DATA["files"], broken)
    rewrite_rows(store, set_to(0, bytes=len(broken), sha256=hashlib.sha256(broken).hexdigest()))
    assert [(check, shard) for check, shard, _ in texts(store)] == [("images", 1)]
    assert "000010000.png: cannot be decoded" in texts(store)[0][2]

    rewrite_rows(store, set_to(2, width=32))
    assert any("16 x 16 pixels where 32 x 16 are recorded" in text for _, _, text in texts(store))


# --- files beside the shards


def test_failed_rows_are_mended_without_making_anything_again(config: JobConfig, store: Store) -> None:
    good = store.read("_run/failed/00001.parquet")
    store.write("_run/failed/00001.parquet", b"x")
    store.write("_run/failed/00002.parquet", good)
    assert {(check, shard) for check, shard, _ in texts(store)} == {("failed rows", 1), ("failed rows", 2)}

    assert repair(store, verify(store)) == []
    assert store.exists("_SUCCESS")
    assert store.list("_run/failed") == ["_run/failed/00001.parquet"]
    assert store.read("_run/failed/00001.parquet") == good
    assert verify(store).problems == []
    store.delete("_run/failed/00001.parquet")
    assert texts(store) == [("failed rows", 1, "_run/failed/00001.parquet: is missing")]


def test_failed_rows_are_the_same_beside_a_time_that_python_cannot_hold(tmp_path: Path) -> None:
    config = make_job(tmp_path, prompts={"passthrough": ["day"]}, failures={"max_ratio": 1})
    days = pa.array([5_000_000, 1], pa.date32())  # the year 15659, and a date that Python can represent
    pq.write_table(pa.table({"prompt": ["a", "[raise]"], "day": days}), tmp_path / "prompts.parquet")
    finish(config)

    assert texts(Store(config.output.uri)) == []


STRAYS = ["train/notes.txt", "train/00007.tar", "train/x/y", "metadata/00001.json", "_run/x", "_run/commits/1.json"]


@pytest.mark.parametrize("key", [*STRAYS, "_run/tmp/half", "_run/staging/00000/x.parquet"])
def test_a_file_that_no_commit_names_is_found_in_a_complete_run(webdataset: Store, key: str) -> None:
    webdataset.write(key, b"x")

    ((check, shard, text),) = texts(webdataset)
    assert (check, shard) == ("leftovers", None)
    assert text.startswith(f"{key}: ")


def test_a_lost_commit_of_a_complete_run_is_found_and_made_again(config: JobConfig, store: Store) -> None:
    before = data_files(Path(store.uri))
    store.delete("_run/commits/00001.json")

    verdict = verify(store)
    assert verdict.problems[0].text == "1 commit missing, though _SUCCESS is there"
    repair(store, verdict)
    assert not store.exists("_SUCCESS")
    finish(config)
    assert verify(store).problems == []
    assert data_files(Path(store.uri)) == before


def test_a_storage_outage_is_raised(webdataset: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(key: str, folder: Path) -> Path:
        raise StoreError(f"{key}: cannot read: 503")

    monkeypatch.setattr(webdataset, "local_file", away)
    with pytest.raises(StoreError, match="503"):
        verify(webdataset)


def test_an_output_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="there is no run here"):
        verify(Store(str(tmp_path)))


@pytest.mark.parametrize("word", ["verify", "gallery", "status", "plan", "run"])
def test_a_damaged_plan_is_named_in_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    config = make_run(tmp_path / "run", "webdataset")
    Store(config.output.uri).write("_run/plan.parquet", b"PAR1 or not")
    of_a_job = word in ("plan", "run")
    target = str(write_job(config, tmp_path / "job.yaml")) if of_a_job else config.output.uri

    code, text = command(capsys, word, target)

    assert code == DamagedObject.exit_code
    assert re.search(r"_run/plan\.parquet (or _run/job\.yaml )?is damaged: not a plan of this program", text), text


# --- the command line


def test_the_exit_code_of_verify_tells_good_from_broken(
    config: JobConfig, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(capsys, "verify", store.uri)[0] == 0
    flip(Path(store.uri, DATA[config.output.format]))
    assert command(capsys, "verify", store.uri, "--quick")[0] == 0

    code, text = command(capsys, "verify", store.uri)
    assert code == 3
    assert "BROKEN: 1 shard;" in text
    code, text = command(capsys, "verify", store.uri, "--repair")
    assert code == 3
    assert "1 shard is missing now" in text
    finish(config)
    assert command(capsys, "verify", store.uri, "--repair")[0] == 0


def test_verify_and_gc_leave_a_run_of_another_driver_alone(
    webdataset: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(webdataset.uri, DATA["webdataset"]).unlink()
    before = set(webdataset.list(""))
    with Lease(Store(webdataset.uri), ttl_s=4):
        for arguments in (["gc", webdataset.uri], ["verify", webdataset.uri, "--repair"]):
            code, text = command(capsys, *arguments)
            assert code == 75
            assert f":{os.getpid()} is at work on this run" in text
    assert before <= set(webdataset.list(""))
