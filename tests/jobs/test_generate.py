"""The entry point of a Ray job: the exit codes that `ray job status`, KubeRay and Airflow use."""

from __future__ import annotations

import json
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from flux_batch import job
from flux_batch.engine.local import LocalEngine
from helpers.fakes import FakePipeline
from helpers.job_files import make_job, write_job

SCRIPT = Path(__file__).parents[2] / "jobs/generate.py"


class Stopped(FakePipeline):
    """A pipeline whose process gets the signal of `ray job stop` at its first call."""

    def __call__(self, *args: Any, **others: Any) -> Any:
        if not self.calls:
            signal.raise_signal(signal.SIGTERM)
        return super().__call__(*args, **others)


def test_a_job_ends_with_the_code_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "" if number == 7 else "a cat"} for number in range(12)]
    file = write_job(make_job(tmp_path, rows), tmp_path / "job.yaml")
    report = tmp_path / "out/_run/report.json"
    pipelines = [Stopped(), FakePipeline()]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(job, "ray_pool", lambda config: LocalEngine())
    monkeypatch.setattr(job, "load_pipeline", lambda model, num_gpus: pipelines.pop(0))

    def generate(*arguments: object) -> object:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return ended.value.code

    assert generate(file, "--set=sampling.width=17") == 2  # a wrong job: nothing is started
    assert not report.exists()
    assert generate(file) == 75  # stopped in order
    assert "1 of 3 shards are committed; run the same command again" in capfd.readouterr().err
    assert not report.exists()
    assert generate(file) == 3  # resumed and finished, with too many failed rows
    assert json.loads(report.read_text())["num_failed"] == 1
    assert generate(file) == 3  # nothing is made again: there is no pipeline left
    assert generate(file, "--set=failures.max_ratio=0.5") == 0
    assert pipelines == []
