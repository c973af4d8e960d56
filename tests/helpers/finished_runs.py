"""Finished runs in each format, for tests that read, damage and clean them, and the command line."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flux_batch.cli import main
from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.job import run
from helpers.fakes import FakePipeline
from helpers.job_files import make_job

LAYOUTS = ["webdataset", "files", "parquet"]
# Three shards of four; the second has a failed row.
ROWS: list[dict[str, Any]] = [
    {"prompt": f"image {number}" + (" [raise]" if number == 5 else "")} for number in range(12)
]
DATA = {"webdataset": "train/00001.tar", "files": "train/00001/000010000.png", "parquet": "train/00001.parquet"}


class Making:
    """A factory of fake pipelines that counts their prompts."""

    def __init__(self) -> None:
        self.pipelines: list[FakePipeline] = []

    def __call__(self, model: ModelConfig) -> FakePipeline:
        self.pipelines.append(FakePipeline())
        return self.pipelines[-1]

    @property
    def prompts(self) -> Counter[str]:
        return Counter(text for pipeline in self.pipelines for call in pipeline.calls for text in call)


def finish(config: JobConfig, making: Making | None = None) -> None:
    assert run(config, engine=LocalEngine(), make_pipeline=making or Making()).is_complete


def make_run(folder: Path, layout: str) -> JobConfig:
    """Write a finished run to `folder`, by a copy of a cached run with the paths changed."""
    first = _first_run(layout)
    config = make_job(folder, ROWS, output={"format": layout}, failures={"max_ratio": 1.0})
    shutil.copytree(first / "out", folder / "out")
    for name in ("job.yaml", "report.json"):
        path = folder / "out/_run" / name
        path.write_text(path.read_text().replace(str(first), str(folder)))
    return config


@cache
def _first_run(layout: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="finished-run-"))
    atexit.register(shutil.rmtree, folder)
    finish(make_job(folder, ROWS, output={"format": layout}, failures={"max_ratio": 1.0}))
    return folder


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main([*arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err
