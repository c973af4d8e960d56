from __future__ import annotations

import pytest

from flux_batch.errors import CheckpointError, RowError, StoreError
from flux_batch.records import LoraUse
from flux_batch.worker.generate import LoraSwitch
from helpers.fakes import FakePipeline

STYLE = LoraUse(name="style", uri="/style.safetensors", scale=0.8)
DETAIL = LoraUse(name="detail", uri="/detail.safetensors", scale=1.0)
MISSING = LoraUse(name="gone", uri="/missing.safetensors", scale=1.0)
AWAY = LoraUse(name="away", uri="s3://away/x.safetensors", scale=1.0)
BROKEN = LoraUse(name="bad", uri="/broken.safetensors", scale=1.0)


def test_what_is_in_use_already_is_not_set_again() -> None:
    pipeline = FakePipeline()
    switch = LoraSwitch(pipeline, (STYLE,))

    for loras in ((STYLE,), (STYLE,), (), (), (STYLE, DETAIL), (STYLE,)):
        assert switch.use(loras) is None

    style, detail = ("/style.safetensors", 0.8), ("/detail.safetensors", 1.0)
    assert pipeline.lora_calls == [[style], [], [style, detail], [style]]


def test_a_pipeline_is_not_asked_for_loras_where_there_are_none() -> None:
    switch = LoraSwitch(object(), ())  # type: ignore[arg-type]

    assert switch.use(()) is None


def test_one_that_cannot_be_read_is_an_error_of_its_rows_with_its_name() -> None:
    error = LoraSwitch(FakePipeline(), ()).use((MISSING,))

    assert isinstance(error, RowError)
    assert str(error) == "lora gone: /missing.safetensors is not there"


def test_after_a_failure_nothing_is_taken_for_granted() -> None:
    pipeline = FakePipeline()
    switch = LoraSwitch(pipeline, (STYLE,))

    assert isinstance(switch.use((BROKEN,)), RuntimeError)
    assert switch.use((STYLE,)) is None

    assert pipeline.lora_calls == [[("/style.safetensors", 0.8)]] * 2


def test_a_storage_that_is_away_is_no_error_of_its_rows() -> None:
    with pytest.raises(StoreError):
        LoraSwitch(FakePipeline(), ()).use((AWAY,))


def test_those_of_the_job_must_be_there() -> None:
    with pytest.raises(CheckpointError):
        LoraSwitch(FakePipeline(), (STYLE, MISSING))
