from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flux_batch.config.schema import JobConfig
from flux_batch.errors import CheckpointError, DeviceFatal, RowError, StoreError
from flux_batch.records import LoraUse
from flux_batch.worker.generate import LoraSwitch
from helpers.fakes import ControlledPipeline, FakePipeline
from helpers.worker_runs import make_job, metadata, open_worker, render

STYLE = LoraUse(name="style", uri="/style.safetensors", scale=0.8)
DETAIL = LoraUse(name="detail", uri="/detail.safetensors", scale=1.0)
MISSING = LoraUse(name="gone", uri="/missing.safetensors", scale=1.0)
AWAY = LoraUse(name="away", uri="s3://away/x.safetensors", scale=1.0)
BROKEN = LoraUse(name="bad", uri="/broken.safetensors", scale=1.0)


def test_loras_in_use_are_not_set_again() -> None:
    pipeline = FakePipeline()
    switch = LoraSwitch(pipeline, (STYLE,))

    for loras in ((STYLE,), (STYLE,), (), (), (STYLE, DETAIL), (STYLE,)):
        assert switch.use(loras) is None

    style, detail = ("/style.safetensors", 0.8), ("/detail.safetensors", 1.0)
    assert pipeline.lora_calls == [[style], [], [style, detail], [style]]


def test_no_loras_are_set_in_a_job_without_any() -> None:
    switch = LoraSwitch(object(), ())  # type: ignore[arg-type]

    assert switch.use(()) is None


def test_a_lora_that_cannot_be_read_fails_its_rows_by_name() -> None:
    error = LoraSwitch(FakePipeline(), ()).use((MISSING,))

    assert isinstance(error, RowError)
    assert str(error) == "lora gone: /missing.safetensors is not there"


def test_after_an_error_loras_are_set_again() -> None:
    pipeline = FakePipeline()
    switch = LoraSwitch(pipeline, (STYLE,))

    assert isinstance(switch.use((BROKEN,)), RuntimeError)
    assert switch.use((STYLE,)) is None

    assert pipeline.lora_calls == [[("/style.safetensors", 0.8)]] * 2


def test_an_unavailable_storage_fails_the_attempt() -> None:
    with pytest.raises(StoreError):
        LoraSwitch(FakePipeline(), ()).use((AWAY,))


def test_the_loras_of_the_job_must_be_readable() -> None:
    with pytest.raises(CheckpointError):
        LoraSwitch(FakePipeline(), (STYLE, MISSING))


@pytest.mark.parametrize("asked", [None, 7.0])
def test_the_guidance_of_a_row_is_that_of_the_model_with_its_loras(tmp_path: Path, asked: float | None) -> None:
    config = job_with_canny(tmp_path, [None, "canny", "style", "none", "canny"], embedded_guidance=asked)
    pipeline = ControlledPipeline()

    render(config, pipeline)

    found = [row["embedded_guidance"] for row in metadata(config)]
    assert found == ([30, 30, 3.5, 3.5, 30] if asked is None else [asked] * 5)
    assert sorted(pipeline.guidances) == sorted(found)


def test_images_with_the_guidance_of_their_loras_are_adopted(tmp_path: Path) -> None:
    config = job_with_canny(tmp_path, ["style", "canny"])
    first = ControlledPipeline(max_calls=1)
    worker, plan = open_worker(config, first)
    with pytest.raises(DeviceFatal):
        worker.make(plan.shards[0])

    render(config, second := ControlledPipeline())

    assert (first.guidances, second.guidances) == ([3.5], [30])
    assert [row["embedded_guidance"] for row in metadata(config)] == [3.5, 30]


def job_with_canny(folder: Path, choices: Sequence[str | None], **sampling: Any) -> JobConfig:
    """Make a job with a row for each of `choices` of its LoRAs `canny` and `style`."""
    rows: list[dict[str, Any]] = [{"prompt": f"image {at}", "lora": name} for at, name in enumerate(choices)]
    loras = [{"uri": f"/{name}.safetensors", "name": name} for name in ("canny", "style")]
    return make_job(folder, rows, model={"loras": loras}, sampling=sampling, output={"shard_size": 9})
