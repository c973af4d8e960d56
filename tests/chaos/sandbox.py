"""A folder in which the command line is run on hostile input, watched from outside."""

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

# Done, shards given up, bad input, finished with too many failures, for later.
EXPECTED = (0, 1, 2, 3, 75)


def fuzz(count: int) -> Callable[[Any], Any]:
    """Let a test take so many examples, the same every time, so that what fails here fails everywhere.

    They share one sandbox, which each leaves as it found it: that is what is tested.
    """
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # a smaller example costs minutes of runs that nobody waits for
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@dataclass(frozen=True)
class Said:
    """What a command came to."""

    code: int
    text: str


class Sandbox:
    """A working directory with an output folder, which alone may change; `run` is the whole command `flux-batch`."""

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
        """Let runs make images with this pipeline; None: with the real one."""
        self._patch.setattr(job, "run", partial(self._run, make_pipeline=make_pipeline))

    def write_job(self, model: Path) -> Path:
        """Write a job of one small image by a model, which runs with the real pipeline. Returns: the job file."""
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
        """Run a command, and hold it to what every command must be."""
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
        assert "(--debug shows where)" not in text, text  # an error that nobody thought of
        assert self._outside() == before, text
        return Said(code, text)

    def _outside(self) -> dict[str, str]:
        """Describe everything but the output."""
        found = {}
        for root, folders, files in os.walk(self.folder):
            if Path(root) == self.folder and self.output.name in folders:
                folders.remove(self.output.name)
            for name in (*folders, *files):
                path = Path(root, name)
                whole = path.is_file() and not path.is_symlink()
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if whole else ""
        return found
