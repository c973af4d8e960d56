"""A folder to run the command line on hostile input, watched for changes outside of the output."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, settings

from flux_batch import cli, job
from flux_batch.config.schema import ModelConfig
from flux_batch.engine.local import LocalEngine
from helpers.fakes import FakePipeline

# Exit codes: done, shards given up, bad input, too many failed rows, to be run again.
EXPECTED = (0, 1, 2, 3, 75)


def fuzz(count: int) -> Callable[[Any], Any]:
    """Run a test with `count` examples, the same every time, so that failures are reproducible.

    The examples share one sandbox; the test checks that each leaves it unchanged.
    """
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # no shrinking: finding a smaller example would take minutes of runs
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@dataclass(frozen=True)
class Said:
    """The exit code and the output of a command."""

    code: int
    text: str


class Sandbox:
    """A working directory in which `flux-batch` may change only the output folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.output = folder / "out"
        for name in ("home", "work", "cache"):
            (folder / name).mkdir()
        monkeypatch.chdir(folder / "work")
        monkeypatch.setenv("HOME", str(folder / "home"))
        monkeypatch.setenv("FLUX_BATCH_CACHE", str(folder / "cache"))
        self._run = partial(job.run, engine=LocalEngine())
        self._patch = monkeypatch
        self.use(lambda model: FakePipeline())

    def use(self, make_pipeline: Callable[[ModelConfig], Any] | None) -> None:
        """Make runs use this pipeline, or the real one if None."""
        self._patch.setattr(job, "run", partial(self._run, make_pipeline=make_pipeline))

    def write_job(self, model: Path) -> Path:
        """Write a job of one small image for the real pipeline. Returns: the job file."""
        self.use(None)
        prompts, job_file = self.folder / "prompts.parquet", self.folder / "job.yaml"
        pq.write_table(pa.table({"prompt": ["a"]}), prompts)
        tree = {
            "prompts": {"uri": str(prompts)},
            "output": {"uri": str(self.output)},
            "model": {"uri": str(model), "dtype": "float32"},
            "sampling": {"width": 16, "height": 16, "num_inference_steps": 1, "t5_sequence_length": 8},
            "failures": {"max_attempts": 1},
        }
        job_file.write_text(yaml.safe_dump(tree))
        return job_file

    def flux_batch(self, *arguments: str) -> Said:
        """Run a command, and check its exit code, its messages and the files it changed."""
        shutil.rmtree(self.output, ignore_errors=True)
        before = self._outside()
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                code = cli.main(arguments)
            except SystemExit as error:  # of argparse
                code = int(error.code or 0)
        text = said.getvalue()
        assert code in EXPECTED, text
        assert "Traceback" not in text, text
        assert "(--debug shows where)" not in text, text  # an unexpected error
        assert self._outside() == before, text
        return Said(code, text)

    def _outside(self) -> dict[str, str]:
        """Return the digest of each file outside of the output."""
        found = {}
        for root, folders, files in os.walk(self.folder):
            if Path(root) == self.folder and self.output.name in folders:
                folders.remove(self.output.name)
            for name in (*folders, *files):
                path = Path(root, name)
                whole = path.is_file() and not path.is_symlink()
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if whole else ""
        return found
