"""Checks the SkyPilot task and the Hugging Face job with their own parsers, where these are installed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flux_batch.arguments import parser
from flux_batch.errors import Interrupted

CLUSTER = Path(__file__).parents[2] / "cluster"
SKYPILOT = CLUSTER / "skypilot.yaml"


def test_skypilot_takes_its_task() -> None:
    sky = pytest.importorskip("sky", reason="pip install skypilot")
    task = sky.Task.from_yaml(str(SKYPILOT))
    assert (task.name, task.num_nodes) == ("flux-batch", 1)


def test_skypilot_starts_again_what_was_interrupted_and_nothing_that_is_final() -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [Interrupted.exit_code]
    (line,) = [line for line in task["run"].splitlines() if "flux-batch" in line]
    given = parser().parse_args(shlex.split(line.replace("$JOB", task["envs"]["JOB"]))[2:])
    assert given.job == task["envs"]["JOB"]
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n", "-c", script], check=True)
        assert "ray stop" not in script  # it would end SkyPilot's own Ray


def test_hugging_face_takes_its_job() -> None:
    secrets = {"HF_TOKEN": "x", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = [str(CLUSTER / "hf_jobs.sh"), "s3://bucket/jobs/cats.yaml", "--set=sampling.width=512"]

    def submitted(options: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **secrets, "PATH": path, "HF_JOBS": options}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    done = submitted("--dry-run --flavor h200x8")
    assert done.returncode == 0, done.stderr
    assert "flux-batch run s3://bucket/jobs/cats.yaml --set=sampling.width=512" in done.stdout
    assert "h200x8" in done.stdout
    assert submitted("--dry-run --attempts 0").returncode != 0
