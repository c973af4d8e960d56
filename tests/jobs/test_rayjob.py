"""The entry point of a RayJob: the exit codes at which it stops the job, to prevent a new cluster."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

SCRIPT = Path(__file__).parents[2] / "jobs/rayjob.py"


@pytest.fixture
def rayjob() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rayjob", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Jobs:
    """A job server that records the jobs to stop."""

    stopped: ClassVar[list[str]] = []

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)


class Away:
    """A job server that does not answer."""

    def stop_job(self, job: str) -> None:
        raise ConnectionError("nobody there")


@pytest.mark.parametrize(("code", "stopped"), [(0, []), (1, []), (2, ["cats-1"]), (3, ["cats-1"]), (75, [])])
def test_only_what_no_retry_can_change_is_stopped(
    rayjob: ModuleType, monkeypatch: pytest.MonkeyPatch, code: int, stopped: list[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "cats-1"}}))
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Jobs)
    monkeypatch.setattr(Jobs, "stopped", [])
    monkeypatch.setattr(rayjob, "PATIENCE_S", 0)
    asked: list[list[str]] = []
    monkeypatch.setattr(rayjob, "main", lambda words: asked.append(words) or code)

    assert rayjob.exit_code(["s3://bucket/jobs/cats.yaml"]) == code

    assert (asked, Jobs.stopped) == ([["run", "s3://bucket/jobs/cats.yaml"]], stopped)


def test_a_job_that_cannot_be_stopped_fails_with_its_own_code(
    rayjob: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "cats-1"}}))
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Away)

    assert rayjob.exit_code([]) == 2  # the argument parser's code for a missing job file

    said = capsys.readouterr()
    assert "exit code 2: the job file or its prompts are wrong, or a limit is reached" in said.out
    assert "could not be stopped: nobody there" in said.err
