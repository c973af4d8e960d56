"""A run that adds prompt files which arrived after it was planned, or that gives way to another run."""

from pathlib import Path
from typing import Any

import pytest

from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.engine.stop import Stop
from flux_batch.errors import CheckpointError, Interrupted, PlanMismatch, SourceError
from flux_batch.job import run
from flux_batch.output.paths import PROGRESS, SETTLED
from flux_batch.report.summary import RunReport
from flux_batch.resume import job_of_run, open_run
from flux_batch.storage.store import Store
from helpers.fakes import FakePipeline, make_fake_pipeline
from helpers.job_files import data_files, make_job, metadata, write_prompts


def render(config: JobConfig) -> RunReport:
    return run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)


def no_pipeline(model: ModelConfig) -> FakePipeline:
    raise AssertionError("nothing was to be rendered")


def folder_job(folder: Path, *names: str, **sections: dict[str, Any]) -> JobConfig:
    """Return a job over a folder of prompt files with five rows each."""
    for name in names:
        write_prompts(folder / f"prompts/{name}.parquet", [{"prompt": f"{name} {number}"} for number in range(5)])
    return make_job(folder, prompts={"uri": str(folder / "prompts")}, **sections)


def extend(config: JobConfig) -> RunReport:
    return run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline, extend=True)


@pytest.mark.parametrize("layout", ["webdataset", "files", "parquet"])
def test_new_prompt_files_are_taken_in_and_nothing_else_is_touched(tmp_path: Path, layout: str) -> None:
    config = folder_job(tmp_path, "monday", output={"format": layout})
    assert extend(config).num_new_images == 5  # there was no run before
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/train").rglob("*") if path.is_file()}

    folder_job(tmp_path, "a-tuesday")
    with pytest.raises(
        PlanMismatch, match=r"use another output\.uri, or undo:\n  a-tuesday\.parquet: is new; --extend"
    ):
        render(config)
    report = extend(config)

    assert (report.num_shards, report.num_images, report.num_new_images, report.exit_code) == (4, 10, 5, 0)
    assert [row["prompt"] for row in metadata(config)][4:7] == ["monday 4", "a-tuesday 0", "a-tuesday 1"]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}.items()
    assert "10 prompts" in (tmp_path / "out/README.md").read_text()
    assert render(config).num_new_images == 0  # the added files belong to the run


def test_an_extended_run_has_the_seeds_and_bytes_of_one_that_had_the_files_at_once(tmp_path: Path) -> None:
    grown = folder_job(tmp_path / "grown", "1")
    extend(grown)
    folder_job(tmp_path / "grown", "2")
    extend(grown)
    at_once = folder_job(tmp_path / "at-once", "1", "2")
    render(at_once)
    assert data_files(tmp_path / "grown/out") == data_files(tmp_path / "at-once/out")


def test_a_run_with_nothing_new_is_left_alone_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = folder_job(tmp_path, "monday")
    extend(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with caplog.at_level("INFO"):
        report = run(config, engine=LocalEngine(), make_pipeline=no_pipeline, extend=True)
    assert (report.num_images, report.num_new_images, report.exit_code) == (5, 0, 0)
    assert "no prompt file is new" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_new_files_that_are_broken_leave_a_complete_run_complete(tmp_path: Path) -> None:
    config = folder_job(tmp_path, "monday")
    extend(config)
    before = (tmp_path / "out/_run/plan.parquet").read_bytes()
    (tmp_path / "prompts/tuesday.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(SourceError, match=r"tuesday\.parquet"):
        extend(config)
    assert (tmp_path / "out/_SUCCESS").exists()
    assert (tmp_path / "out/_run/plan.parquet").read_bytes() == before


def test_a_run_that_was_extended_has_no_report_until_it_ends_again(tmp_path: Path) -> None:
    config = folder_job(tmp_path, "monday")
    extend(config)
    assert (tmp_path / "out/_run/report.json").exists()
    folder_job(tmp_path, "tuesday")
    stop = Stop()
    stop.request("the test")
    with pytest.raises(Interrupted):
        run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline, extend=True, stop=stop)
    assert not (tmp_path / "out/_run/report.json").exists()  # it would say that the run is complete
    assert render(config).is_complete
    assert (tmp_path / "out/_run/report.json").exists()


@pytest.mark.parametrize("key", ["_SUCCESS", "_run/report.json", "README.md", "_run/plan.parquet"])
def test_a_driver_killed_while_it_takes_in_new_files_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """The driver is killed before each of the writes that extend a run."""
    config = folder_job(tmp_path, "monday")
    extend(config)
    folder_job(tmp_path, "tuesday")
    name = "delete" if key in ("_SUCCESS", "_run/report.json") else "write"
    whole = getattr(Store, name)

    def killed(store: Store, written: str, *values: bytes) -> None:
        if written == key:
            raise KeyboardInterrupt
        whole(store, written, *values)

    with monkeypatch.context() as patch:
        patch.setattr(Store, name, killed)
        with pytest.raises(KeyboardInterrupt):
            extend(config)
    report = extend(config)
    assert (report.num_images, report.num_new_images, report.is_complete) == (10, 5, True)
    assert (tmp_path / "out/_SUCCESS").exists()


def test_a_job_that_made_nothing_leaves_the_next_one_nothing_that_its_worker_settled(tmp_path: Path) -> None:
    def measuring(model: ModelConfig) -> FakePipeline:
        for key in SETTLED:
            store.write(key, b'{"batch_size": 16, "dtype": "float16"}')
        raise CheckpointError("no such model")

    config = make_job(tmp_path)
    store = Store(config.output.uri)
    with pytest.raises(CheckpointError):
        run(config, engine=LocalEngine(), make_pipeline=measuring)

    open_run(make_job(tmp_path, sampling={"width": 32}), store)

    assert [key for key in (*SETTLED, PROGRESS) if store.exists(key)] == []


@pytest.mark.parametrize(("width", "dtype"), [(16, "float32"), (32, "auto")], ids=["goes on", "takes its place"])
def test_a_job_has_the_dtype_of_a_run_that_it_goes_on_with_and_none_of_one_whose_place_it_takes(
    tmp_path: Path, width: int, dtype: str
) -> None:
    begun = make_job(tmp_path, model={"dtype": "float32"})
    store = Store(begun.output.uri)
    open_run(begun, store)

    assert job_of_run(make_job(tmp_path, sampling={"width": width}), store).model.dtype == dtype
