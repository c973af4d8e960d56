"""A run that is killed before each of its writes, and started again."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.job import run
from flux_batch.report.summary import RunReport
from flux_batch.storage.store import Store
from helpers.fakes import make_fake_pipeline
from helpers.job_files import data_files, make_job


class Killed(BaseException):
    """The death of the driver: nothing in the program catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """Raise Killed just before write number `step` to the store. Returns: a function that counts the writes."""
    count = 0

    def counting(real: Callable[..., None]) -> Callable[..., None]:
        def write(*arguments: Any) -> None:
            nonlocal count
            count += 1
            if count == step:
                raise Killed
            real(*arguments)

        return write

    monkeypatch.setattr(Store, "write", counting(Store.write))
    monkeypatch.setattr(Store, "put_if_absent", counting(Store.put_if_absent))
    return lambda: count


def render(config: JobConfig) -> RunReport:
    return run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(("first", "layout"), [(0, "webdataset"), (1, "files"), (2, "parquet")])
def test_a_run_killed_before_any_write_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, layout: str, every: int
) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": None}, {"prompt": "c"}, {"prompt": "d"}]
    sections: dict[str, Any] = {"output": {"format": layout, "shard_size": 3}, "failures": {"max_ratio": 1.0}}
    render(make_job(tmp_path / "whole", rows, **sections))
    whole = data_files(tmp_path / "whole/out")
    for step in count(1 + first % every, every):  # each layout tests its share of the writes
        config = make_job(tmp_path / str(step), rows, **sections)
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            try:
                render(config)
                died = False
            except Killed:
                died = True
        assert render(config).is_complete
        assert data_files(tmp_path / str(step) / "out") == whole, f"killed before write {step}"
        if not died:
            break
    assert step > 12
