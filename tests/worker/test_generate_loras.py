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
