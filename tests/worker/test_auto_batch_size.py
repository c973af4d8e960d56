from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flux_batch.config.schema import ModelConfig, SamplingConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import DamagedObject, OutOfMemory
from flux_batch.job import run
from flux_batch.output.gc import find_leftovers
from flux_batch.output.paths import RunFolder
from flux_batch.storage.store import Store
from flux_batch.worker.auto_batch_size import measured_batch_size, remembered_batch_size
from helpers.fakes import FakePipeline, make_fake_pipeline
from helpers.job_files import data_files, make_job, metadata

SAMPLING = SamplingConfig(width=16, height=16, num_inference_steps=2)


class Device:
    """A pipeline and its clock: a call takes a second up to `room` images, and longer for more."""

    def __init__(self, *, room: int, memory: int = 100) -> None:
        self.room, self.memory, self.now = room, memory, 0.0
        self.calls: list[int] = []
        self.needed_images: tuple[str, ...] = ()

    def __call__(self, prompt: Sequence[str], **_: Any) -> list[Any]:
        if len(prompt) > self.memory:
            raise OutOfMemory("too many")
        self.calls.append(len(prompt))
        self.now += max(1.0, len(prompt) / self.room)
        return [None] * len(prompt)

    def measured(self) -> int:
        return measured_batch_size(self, SAMPLING, lambda: None, lambda: self.now)  # type: ignore[arg-type]


@pytest.mark.parametrize(("room", "expected"), [(1, 1), (2, 2), (3, 4), (4, 4), (100, 16)])
def test_the_batch_grows_while_it_saves_time(room: int, expected: int) -> None:
    assert Device(room=room).measured() == expected


def test_a_batch_is_no_larger_than_memory() -> None:
    assert Device(room=100, memory=5).measured() == 4


def test_measuring_ends_once_a_larger_batch_saves_nothing() -> None:
    device = Device(room=1)
    device.measured()
    assert device.calls == [1, 1, 2, 2]


def test_the_first_measurement_of_a_run_counts(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert remembered_batch_size(store, lambda: 8) == 8
    assert remembered_batch_size(store, lambda: pytest.fail("measured again")) == 8


def test_two_workers_that_measure_at_once_take_the_size_written_first(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    def overtaken() -> int:
        assert remembered_batch_size(store, lambda: 2) == 2
        return 16

    assert remembered_batch_size(store, overtaken) == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"batch_size": 0}', '{"batch_size": "many"}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "_run").mkdir()
    (tmp_path / "_run/batch_size.json").write_text(text)
    with pytest.raises(DamagedObject, match=r"_run/batch_size\.json: is damaged"):
        remembered_batch_size(Store(str(tmp_path)), lambda: 1)


def test_an_automatic_batch_size_makes_the_same_images(tmp_path: Path) -> None:
    sizes: list[int] = []

    class Counting(FakePipeline):
        def __call__(self, prompt: Sequence[str], **arguments: Any) -> Any:
            sizes.append(len(prompt))
            return super().__call__(prompt, **arguments)

    def counting(model: ModelConfig) -> Counting:
        return Counting()

    config = make_job(tmp_path / "auto", workers={"batch_size": "auto"})
    (tmp_path / "auto/out/_run").mkdir(parents=True)
    (tmp_path / "auto/out/_run/batch_size.json").write_text(json.dumps({"batch_size": 3}))
    run(config, engine=LocalEngine(), make_pipeline=counting)
    assert sizes == [3, 1, 3, 1, 2]

    plain = make_job(tmp_path / "plain")
    run(plain, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    assert data_files(tmp_path / "auto/out") == data_files(tmp_path / "plain/out")

    measured = make_job(tmp_path / "measured", workers={"batch_size": "auto"})
    assert run(measured, engine=LocalEngine(), make_pipeline=make_fake_pipeline).is_complete
    assert json.loads((tmp_path / "measured/out/_run/batch_size.json").read_text())["batch_size"] in (1, 2, 4, 8, 16)
    assert len(metadata(measured)) == 10
    assert not list(find_leftovers(RunFolder(Store(str(tmp_path / "measured/out")), 3)))
