"""The removal of files that no commit names: it removes nothing else, and the run stays valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import StoreRefused
from flux_batch.job import run
from flux_batch.output.gc import find_leftovers, remove_leftovers
from flux_batch.report.saved_run import SavedRun
from flux_batch.report.verify import verify
from flux_batch.storage.multipart import Upload
from flux_batch.storage.store import Store
from helpers.counting_proxy import counting_proxy
from helpers.fakes import make_fake_pipeline
from helpers.finished_runs import LAYOUTS, ROWS, command, finish, make_run
from helpers.job_files import make_job
from helpers.s3 import S3Server

COMMIT = "_run/commits/00001.json"


@pytest.fixture(params=LAYOUTS)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> JobConfig:
    return make_run(tmp_path / "run", request.param)


@pytest.fixture
def store(config: JobConfig) -> Store:
    return Store(config.output.uri)


def test_gc_removes_the_files_that_no_commit_names_and_no_others(
    config: JobConfig, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {key: store.read(key) for key in store.list("")}
    Path(store.uri, "mine.txt").write_text("beside the run")
    store.write("_run/gallery/index.html", b"x")  # written by flux-batch
    before["_run/gallery/index.html"] = b"x"
    strange = ["_run/tmp/half", "_run/staging/00000/x.parquet", "train/notes.txt", "train/00007.tar", "metadata/x"]
    for key in strange:
        store.write(key, b"x")

    code, text = command(capsys, "gc", store.uri, "--dry-run")
    assert (code, sorted(line.split()[-1] for line in text.splitlines())) == (0, sorted(strange))
    code, text = command(capsys, "gc", store.uri)

    assert (code, text) == (0, "5 objects removed\n")
    left = {key: store.read(key) for key in store.list("") if not key.startswith("_run/lease/")}
    assert left.pop("mine.txt") == b"beside the run"
    assert left == {key: data for key, data in before.items() if not key.startswith("_run/lease/")}
    assert verify(store).problems == []


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_gc_reads_no_commit_of_a_shard_whose_file_is_that_of_the_log(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(make_run(tmp_path, layout).output.uri)
    data = next(key for key in store.list("train") if "00001" in key)
    store.write(data, store.read(data) + b"x")  # differs from the committed file
    asked: list[str] = []
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda self, key: asked.append(key) or read(self, key))

    assert command(capsys, "gc", store.uri) == (0, "nothing to remove\n")

    assert [key for key in asked if "/commits/" in key] == ["_run/commits/00001.json"]


def test_a_shard_that_was_committed_since_it_was_listed_stays(config: JobConfig, store: Store) -> None:
    commit = store.read(COMMIT)
    store.delete(COMMIT)
    saved = SavedRun.open(store)
    leftovers = list(find_leftovers(saved.folder))
    assert leftovers
    store.write(COMMIT, commit)

    assert remove_leftovers(saved.folder, saved.output_format, leftovers) == 0

    assert verify(store).problems == []


def test_a_commit_that_comes_while_its_files_are_removed_is_reverted(config: JobConfig, store: Store) -> None:
    class LateStore(Store):
        """A store in which a worker commits its shard once the first file of the shard is removed."""

        commit = b""

        def delete(self, key: str) -> None:
            super().delete(key)
            if commit := self.commit:
                self.commit = b""
                self.write(COMMIT, commit)

    late = LateStore(store.uri)
    late.commit = store.read(COMMIT)
    store.delete(COMMIT)
    saved = SavedRun.open(late)

    remove_leftovers(saved.folder, saved.output_format, list(find_leftovers(saved.folder)))

    assert saved.commits.done() == {0, 2}
    finish(config)
    assert verify(store).problems == []


def test_gc_removes_nothing_behind_a_link(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = tmp_path / "others" / "deep" / "x"
    others.parent.mkdir(parents=True)
    others.write_text("of others")
    for folder in ("train", "metadata", "_run", "_run/staging", "_run/mine"):
        Path(store.uri, folder).mkdir(exist_ok=True)
        Path(store.uri, folder, "link").symlink_to(tmp_path / "others")
    code, text = command(capsys, "gc", store.uri)
    assert (code, text) == (0, "1 object removed\n")  # the link in `_run/mine`, not its target
    assert others.read_text() == "of others"


def test_gc_keeps_the_staged_images_of_unfinished_shards(
    config: JobConfig, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("_SUCCESS", "_run/commits/00002.json"):
        store.delete(key)
    store.write("_run/staging/00002/x.parquet", b"x")
    assert command(capsys, "gc", store.uri)[0] == 0

    assert store.list("_run/staging") == ["_run/staging/00002/x.parquet"]
    assert [key for key in store.list("train") + store.list("metadata") if "/00002" in key] == []
    finish(config)
    assert verify(store).problems == []


def test_parts_that_a_killed_writer_left_are_found_and_aborted(
    tmp_path: Path, moto: S3Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = {"uri": f"{moto.make_bucket()}/run", "storage_options": moto.storage_options}
    config = make_job(tmp_path, ROWS, output=output, failures={"max_ratio": 1.0})
    finish(config)
    store = Store(config.output.uri, config.output.storage_options)
    bucket, _, key = f"{store.uri}/train/00001.tar".removeprefix("s3://").partition("/")
    foreign = ["nested/train/00001.tar", "notes.bin"]  # of a run in a subfolder, and of another tool
    for other in foreign:
        store._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key.replace("train/00001.tar", other))
    epochs = store.list("_run/lease")
    finish(config)
    assert store.list("_run/lease") == epochs
    for _ in range(2):
        store._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    half_written = "train/00001.tar: half-written; `flux-batch gc` removes it"
    assert [problem.text for problem in verify(store, quick=True).problems] == [half_written] * 2

    store._fs.call_s3("put_bucket_versioning", Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    options = [f"--storage-option={key}={value}" for key, value in moto.storage_options.items()]
    code, said = command(capsys, "gc", store.uri, *options)
    assert code == 0
    assert said.startswith("2 objects removed; the bucket keeps versions, so their bytes remain until")
    assert verify(store).problems == []

    store._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "abort", denied)
        finish(config)
    assert len(store.unfinished_uploads()) == 3
    finish(config)
    assert [store.key_of(upload) for upload in store.unfinished_uploads()] == foreign


@pytest.mark.s3
def test_many_leftovers_in_a_bucket_are_removed_by_few_requests(
    tmp_path: Path, moto: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    with counting_proxy(moto.endpoint_url) as proxy:
        options = {**moto.storage_options, "endpoint_url": proxy.endpoint_url}
        config = make_job(tmp_path, ROWS, output={"uri": f"{moto.make_bucket()}/run", "storage_options": options})
        run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
        store = Store(config.output.uri, options)
        for number in range(30):
            store.write(f"train/notes-{number}.txt", b"x")
            store.write(f"_run/tmp/{number}", b"x")
        proxy.requests.clear()

        given = [f"--storage-option={key}={value}" for key, value in options.items()]
        assert command(capsys, "gc", store.uri, *given) == (0, "60 objects removed\n")

        removing = [path for method, path, _ in proxy.requests if method == "DELETE" or "?delete" in path]
        assert len(removing) < 5  # one for all objects, and those of the lease


def denied(store: Store, upload: Upload) -> None:
    raise StoreRefused(f"{store.key_of(upload)}: AccessDenied")
