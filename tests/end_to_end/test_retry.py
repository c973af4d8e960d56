"""--retry-failed makes only failed rows again, and loses no image if the run is killed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import DeviceFatal
from flux_batch.job import run
from flux_batch.output.commits import Commits
from flux_batch.output.paths import REVERTING
from flux_batch.output.revert import revert
from flux_batch.report.saved_run import SavedRun
from flux_batch.report.summary import RunReport
from flux_batch.storage.store import Store
from helpers.fakes import FakePipeline, make_fake_pipeline
from helpers.job_files import data_files, make_job, metadata
from helpers.mortal import Death, Life, MortalStore

FAILING = [2, 5, 8]
ROWS = [{"prompt": f"image {number}" + (" [raise]" if number in FAILING else "")} for number in range(12)]
LAYOUTS = ["webdataset", "files", "parquet"]


class Healed(FakePipeline):
    """A pipeline that never fails."""

    def _misbehave(self, prompt: str, batch_size: int, *, is_tiled: bool) -> None:
        pass


class Making:
    """A factory of healed pipelines that counts their prompts."""

    def __init__(self) -> None:
        self.made: list[FakePipeline] = []

    def __call__(self, model: ModelConfig) -> FakePipeline:
        self.made.append(Healed())
        return self.made[-1]

    @property
    def prompts(self) -> Counter[str]:
        return Counter(text for pipeline in self.made for call in pipeline.calls for text in call)


def job(folder: Path, layout: str = "webdataset", rows: list[dict[str, Any]] = ROWS) -> JobConfig:
    return make_job(folder, rows, output={"format": layout}, failures={"max_ratio": 1.0})


def healed(config: JobConfig, making: Making | None = None, **options: Any) -> RunReport:
    return run(config, engine=LocalEngine(), make_pipeline=making or Making(), **options)


@pytest.fixture(params=LAYOUTS)
def failed(request: pytest.FixtureRequest, tmp_path: Path) -> JobConfig:
    """A complete run of three shards, with one failed image in each."""
    config = job(tmp_path / "failed", request.param)
    report = run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    assert (report.is_complete, report.num_failed) == (True, 3)
    return config


def test_only_what_failed_is_made_again_and_the_bytes_are_those_of_a_run_without_failures(
    failed: JobConfig, tmp_path: Path
) -> None:
    whole = job(tmp_path / "whole", failed.output.format)
    healed(whole)
    making = Making()

    report = healed(failed, making, retry_failed=True)

    assert (report.is_complete, report.num_failed, report.num_images) == (True, 0, 12)
    assert making.prompts == Counter(ROWS[number]["prompt"] for number in FAILING)
    assert data_files(Path(failed.output.uri)) == data_files(Path(whole.output.uri))
    assert Store(failed.output.uri).list("_run/failed") == []
    assert Store(failed.output.uri).list("_run/staging") == []


def test_what_failed_in_a_shard_that_is_not_committed_is_made_again(tmp_path: Path) -> None:
    whole, config = job(tmp_path / "whole"), job(tmp_path / "stopped")
    healed(whole)

    class Breaking(FakePipeline):
        def _misbehave(self, prompt: str, batch_size: int, *, is_tiled: bool) -> None:
            if prompt == ROWS[6]["prompt"]:  # in the batch after one with a failed image
                raise DeviceFatal("broken")
            super()._misbehave(prompt, batch_size, is_tiled=is_tiled)

    with pytest.raises(DeviceFatal):
        run(config, engine=LocalEngine(), make_pipeline=lambda model: Breaking())
    assert Store(config.output.uri).list("_run/staging")

    report = healed(config, retry_failed=True)

    assert (report.is_complete, report.num_failed) == (True, 0)
    assert data_files(Path(config.output.uri)) == data_files(Path(whole.output.uri))


def test_without_the_flag_and_without_failures_there_is_nothing_to_do(failed: JobConfig) -> None:
    making = Making()
    assert healed(failed, making).num_failed == 3
    healed(failed, making, retry_failed=True)
    before = data_files(Path(failed.output.uri))
    num_made = making.prompts.total()

    report = healed(failed, making, retry_failed=True)

    assert (report.exit_code, report.num_new_images) == (0, 0)
    assert making.prompts.total() == num_made == 3
    assert data_files(Path(failed.output.uri)) == before


def test_shards_without_failures_are_not_touched(tmp_path: Path) -> None:
    config = job(tmp_path, rows=[*ROWS[:3], *({"prompt": f"fine {number}"} for number in range(9))])
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    before = {path: path.stat().st_mtime_ns for path in Path(config.output.uri).rglob("*") if path.is_file()}

    healed(config, retry_failed=True)

    touched = {path.relative_to(config.output.uri).as_posix() for path, at in before.items() if at_of(path) != at}
    assert {name for name in touched if name.startswith(("train/", "metadata/", "_run/commits"))} == {
        "train/00000.tar",
        "metadata/00000.parquet",
        "_run/commits/00000.json",
    }


def test_the_commits_of_other_shards_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job(tmp_path, rows=[*ROWS[:3], *({"prompt": f"fine {number}"} for number in range(9))])
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    asked: list[int] = []
    read = Commits.read
    monkeypatch.setattr(Commits, "read", lambda self, shard: asked.append(shard) or read(self, shard))

    assert healed(config, retry_failed=True).num_images == 12

    assert set(asked) == {0}  # the log of commits has the others


def test_what_was_taken_back_already_keeps_what_was_staged_of_it(failed: JobConfig) -> None:
    store = Store(failed.output.uri)
    saved = SavedRun.open(store)
    for _ in range(2):
        revert(saved.folder, saved.output_format, [0])
    making = Making()
    healed(failed, making)
    assert making.prompts == Counter({ROWS[2]["prompt"]: 1})


def at_of(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.long)])
def test_a_kill_at_any_write_of_it_loses_no_image(
    failed: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    whole = job(tmp_path / "whole", failed.output.format)
    healed(whole)
    share = every * len(LAYOUTS)  # each layout tests its share of the writes
    for last in range(every * LAYOUTS.index(failed.output.format), 1000, share):
        config = job(tmp_path / str(last), failed.output.format)
        run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
        making, life = Making(), Life(last)
        with monkeypatch.context() as patch:
            its_store = type("ItsStore", (MortalStore,), {"life": life})
            patch.setattr(Store, "guarded", lambda store, before_write, its=its_store: its(store.uri))
            try:
                healed(config, making, retry_failed=True)
                is_over = True
            except Death:
                is_over = False

        healed(config, making)
        assert Store(config.output.uri).list(REVERTING) == []
        assert [row["prompt"] for row in metadata(config)] == [row["prompt"] for row in ROWS]
        for row in metadata(config):
            assert row["status"] == "success" or "[raise]" in row["prompt"]
        healed(config, making, retry_failed=True)
        assert data_files(Path(config.output.uri)) == data_files(Path(whole.output.uri)), last
        assert making.prompts.keys() == {ROWS[number]["prompt"] for number in FAILING}
        if is_over:
            break
    assert last >= 3 * 7
