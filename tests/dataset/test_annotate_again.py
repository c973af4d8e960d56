"""Killed or stopped annotating, and images that are made again: no value is lost or of an old image."""

from __future__ import annotations

import io
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import flux_batch.dataset.annotate_shard
import flux_batch.dataset.annotate_worker
from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import FluxBatchError, PlanMismatch, Stopped
from flux_batch.images import Pixels
from flux_batch.job import run
from flux_batch.output.revert import revert
from flux_batch.records import Attempt
from flux_batch.report.saved_run import SavedRun
from flux_batch.storage.store import Store
from helpers import annotators
from helpers.annotate_runs import BOTH, after_calls, annotated, files, open_worker, rows, shard_of
from helpers.fakes import FakePipeline
from helpers.finished_runs import DATA, LAYOUTS, Making, command, finish, make_run
from helpers.job_files import make_job
from helpers.mortal import Death, Life, MortalStore


def test_a_pass_that_is_killed_at_any_write_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flux_batch.dataset.annotate_shard, "STAGE_AFTER_S", 0.0)
    config = make_job(tmp_path, [{"prompt": f"image {number}" + " [sour]" * (number == 5)} for number in range(7)])
    finish(config)
    annotated(config, *BOTH)
    undisturbed = files(config)
    num_writes = 0
    for last in range(0, 100, 4):
        annotated(config, *BOTH, anew=True, engine=_Nothing())
        life = Life(last)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flux_batch.dataset.annotate_worker.Store", type("ItsStore", (MortalStore,), {"life": life}))
            try:
                worker = open_worker(config, *BOTH)
                for index in range(2):
                    worker.make(shard_of(index)).finish()
            except Death:
                num_writes += 1
        annotators.CALLS.clear()
        annotated(config, *BOTH)
        assert files(config) == undisturbed, f"killed at write {last}"
        if not life.is_over:
            break
    assert num_writes > 4


class _Nothing:
    """An engine without workers."""

    def run(self, factory: Any, shards: Any, stop: Any, state: Any = None) -> Any:
        return iter(())


@pytest.mark.parametrize("options", [{"retry_failed": True}, {"anew": True, "prompts.scale": 2}])
def test_a_pass_that_is_killed_while_it_removes_what_shall_be_made_again_adopts_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    prompts = [f"image {number}" + " [sour]" * (number == 5) for number in range(7)]
    config = make_job(tmp_path, [{"prompt": prompt} for prompt in prompts])
    finish(config)
    annotated(config, BOTH[0])
    output, before = Path(config.output.uri), tmp_path / "before"
    shutil.copytree(output, before)
    monkeypatch.setattr(annotators, "misbehave", lambda prompt: None)
    scale = {name: value for name, value in options.items() if "." in name}
    num_kills = 0
    for last in range(100):
        shutil.rmtree(output)
        shutil.copytree(before, output)
        life = Life(last)
        with pytest.MonkeyPatch.context() as patch, suppress(Death):
            patch.setattr("flux_batch.dataset.annotate.Store", type("ItsStore", (MortalStore,), {"life": life}))
            annotated(config, BOTH[0], engine=_Nothing(), **options)
        if not life.is_over:
            break
        num_kills += 1
        shutil.rmtree(output / "_run/lease")  # the lease belongs to this process, which has not ended
        with suppress(PlanMismatch):  # the other settings may not be forgotten yet
            annotated(config, BOTH[0], **scale, retry_failed="retry_failed" in options)
            if scale:
                lengths = [row["length"] for row in rows(config, "prompts")]
                assert lengths == [2 * len(prompt) for prompt in prompts], f"killed at write {last}"
            else:
                assert all(row["error_type"] is None for row in rows(config, "prompts")), f"killed at write {last}"
    assert num_kills > 4


def test_rows_that_are_staged_are_not_made_again_and_a_stop_stages_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_job(tmp_path, [{"prompt": f"image {number}"} for number in range(6)], output={"shard_size": 6})
    finish(config)
    worker = open_worker(config, BOTH[0])
    annotators.CALLS.clear()
    after_calls(monkeypatch, 2, worker.stop)

    with pytest.raises(Stopped):
        worker.make(shard_of(0))
    monkeypatch.undo()
    annotators.CALLS.clear()
    annotated(config, BOTH[0])

    assert annotators.CALLS == [["000000004", "000000005"]]


def test_staged_rows_without_values_are_tried_again_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["a", "b", "c", "d [sour]"]
    config = make_job(tmp_path, [{"prompt": prompt} for prompt in prompts], output={"shard_size": 4})
    finish(config)
    open_worker(config, BOTH[0]).make(shard_of(0))  # staged, but never finished
    monkeypatch.setattr(annotators, "misbehave", lambda prompt: None)
    annotators.CALLS.clear()

    report = annotated(config, BOTH[0], retry_failed=True)

    assert report.annotations[0].num_failed == 0
    assert annotators.CALLS == [["000000002", "000000003"]], "the image, in its batch"


def _made_by_mortals(config: JobConfig) -> tuple[int, Any]:
    """Run workers on the first shard until one survives. Returns: the deaths, and the survivor's shard."""
    for lives in range(9):
        life = Life()
        with pytest.MonkeyPatch.context() as patch, suppress(Death):
            patch.setattr("flux_batch.dataset.annotate_worker.Store", type("Its", (MortalStore,), {"life": life}))
            patch.setattr("os._exit", lambda code, life=life: life.end())
            return lives, open_worker(config, BOTH[0]).make(shard_of(0, 5), Attempt(lost=lives, reason="it died"))
    raise AssertionError("each worker dies")


def test_an_image_that_kills_its_worker_is_found_by_its_marks_and_set_aside(tmp_path: Path) -> None:
    prompts = ["a", "b", "c [kill]", "d", "e"]
    config = make_job(tmp_path, [{"prompt": prompt} for prompt in prompts], output={"shard_size": 5})
    finish(config)
    lives, made = _made_by_mortals(config)
    made.finish()
    assert lives == 4, "once unmarked, once in its batch, twice alone"
    row = rows(config, "prompts")[2]
    assert (row["length"], row["error_type"]) == (None, "WorkerLost")
    assert row["error_message"].endswith("the last: it died")
    assert [row["length"] for row in rows(config, "prompts")] == [1, 1, None, 1, 1]


def test_a_staged_image_that_killed_its_workers_is_tried_again_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["a", "b", "c [kill]", "d", "e"]
    config = make_job(tmp_path, [{"prompt": prompt} for prompt in prompts], output={"shard_size": 5})
    finish(config)
    _made_by_mortals(config)  # staged, but never finished
    monkeypatch.setattr(annotators, "misbehave", lambda prompt: None)
    annotators.CALLS.clear()

    assert annotated(config, BOTH[0], retry_failed=True).annotations[0].num_failed == 0

    assert annotators.CALLS == [["000000002"]], "alone, since it may do it again"


def test_images_that_stay_keep_their_rows_when_their_shard_is_made_again(tmp_path: Path) -> None:
    prompts = ["a", "b [raise]", "c", "d"]
    config = make_job(tmp_path, [{"prompt": prompt} for prompt in prompts], failures={"max_ratio": 1.0})
    finish(config)
    annotated(config, BOTH[0])
    assert run(config, engine=LocalEngine(), make_pipeline=_forgiving, retry_failed=True).num_failed == 0
    assert files(config) == {}
    annotators.CALLS.clear()

    annotated(config, BOTH[0])

    assert annotators.CALLS == [["000000000", "000000001"]], "the new image, in its batch"
    assert len(rows(config, "prompts")) == 4


def test_rows_of_a_shard_that_is_being_made_again_outlive_a_pass(tmp_path: Path) -> None:
    config = make_run(tmp_path, "webdataset")
    annotated(config, BOTH[0])
    whole = files(config)
    saved = SavedRun.open(Store(config.output.uri))
    revert(saved.folder, saved.output_format, [0])
    annotators.CALLS.clear()

    annotated(config, BOTH[0])
    finish(config)
    annotated(config, BOTH[0])

    assert annotators.CALLS == []
    assert files(config) == whole
    assert saved.store.list("_run/annotations/prompts/staging") == []


def test_rows_about_images_that_were_made_again_meanwhile_are_not_committed(tmp_path: Path) -> None:
    config = make_run(tmp_path, "webdataset")
    made = open_worker(config, BOTH[0]).make(shard_of(0))
    saved = SavedRun.open(Store(config.output.uri))
    revert(saved.folder, saved.output_format, [0])
    saved.store.delete_folder("_run/staging")
    run(config, engine=LocalEngine(), make_pipeline=lambda model: _Negative())

    with pytest.raises(FluxBatchError, match="the images of shard 0 were made again while they were annotated"):
        made.finish()
    annotated(config, BOTH[0])

    with Image.open(io.BytesIO(saved.image(saved.metadata(0)[0]) or b"")) as image:
        assert rows(config, "prompts")[0]["red"] == image.getpixel((0, 0))[0]  # type: ignore[index]


class _Negative(FakePipeline):
    """Makes different images from the same rows."""

    def __call__(self, *texts: Any, **others: Any) -> list[Pixels]:
        return [255 - image for image in super().__call__(*texts, **others)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_with_other_bytes_has_no_values_until_it_is_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    config = make_run(tmp_path, layout)
    path = Path(config.output.uri, DATA[layout])
    path.write_bytes(path.read_bytes().replace(b"image 4", b"image 9"))

    annotated(config, BOTH[0])

    found = [row["error_type"] for row in rows(config, "prompts")]
    assert found == [None] * 4 + ["ImageDamaged"] + [None] * 6
    assert command(capsys, "verify", config.output.uri, "--repair")[0] == 3
    finish(config)
    annotators.CALLS.clear()
    annotated(config, BOTH[0])
    assert [row["error_type"] for row in rows(config, "prompts")] == [None] * 11
    assert annotators.CALLS == [["000010000", "000010002"]], "the image, in its batch"


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "commit"])
def test_damaged_annotations_are_found_and_made_again_to_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    config = make_run(tmp_path, LAYOUTS[0])
    annotated(config, *BOTH)
    before = files(config)
    code, text = command(capsys, "verify", config.output.uri)
    assert (code, f"{len(before)} files" in text) == (0, True)
    broken = Path(config.output.uri, "annotations", "prompts", "00001.parquet")
    data = broken.read_bytes()
    if damage == "flip":
        broken.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    elif damage == "cut":
        broken.write_bytes(data[:-9])
    elif damage == "remove":
        broken.unlink()
    else:
        Path(config.output.uri, "_run/annotations/prompts/commits/00001.json").write_bytes(b"{")

    code, text = command(capsys, "verify", config.output.uri, "--repair")
    assert code == 3
    assert "shard 1: annotations: annotations/prompts/00001.parquet: " in text
    assert "BROKEN: annotations of prompts" in text
    assert len(files(config)) == len(before) - 1
    annotated(config, *BOTH)

    assert files(config) == before
    assert command(capsys, "verify", config.output.uri)[0] == 0


def _forgiving(model: Any) -> Any:
    pipeline = Making()(model)
    pipeline._misbehave = lambda *args, **others: None  # type: ignore[method-assign]
    return pipeline
