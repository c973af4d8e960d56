"""The DAG of jobs/airflow_dag.py without a cluster; tests/jobs/test_submit.py has it submit to one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.job_submission
from ray.job_submission import JobStatus

from helpers.airflow_stub import DAG_FILE, AirflowFailException, load_dag


@dataclass
class Jobs:
    """A fake job server and its client; the job ends at the second request."""

    status: JobStatus = JobStatus.SUCCEEDED
    code: int | None = 0
    running: list[Any] = field(default_factory=list)
    submitted: list[dict[str, Any]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    num_looks: int = 0
    breaks: bool = False
    errors: list[Exception] = field(default_factory=list)

    def __call__(self, address: str) -> Jobs:
        return self

    def list_jobs(self) -> list[Any]:
        return self.running

    def submit_job(self, **job: Any) -> str:
        self.submitted.append(job)
        return "new"

    def get_job_info(self, submission_id: str) -> Any:
        self.num_looks += 1
        if self.breaks:
            raise KeyboardInterrupt
        if self.errors:
            raise self.errors.pop()
        status = self.status if self.num_looks > 1 else JobStatus.RUNNING
        return SimpleNamespace(status=status, driver_exit_code=self.code, message="so it was")

    def stop_job(self, submission_id: str) -> None:
        self.stopped.append(submission_id)


def render(jobs: Jobs, monkeypatch: pytest.MonkeyPatch, output: Path) -> Any:
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", jobs)
    dag, _ = load_dag(monkeypatch)
    return dag.render_day("2026-11-23", output=f"{output}/{{date}}", poll_s=0.01)


def write_report(folder: Path, **fields: Any) -> None:
    path = folder / "2026-11-23/_run/report.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("version", [2, 3])
def test_the_file_is_a_dag_of_one_task(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    dag, airflow = load_dag(monkeypatch, version)

    assert airflow.dags["flux_nightly"]["max_active_runs"] == 1
    render, settings = airflow.tasks["render"]
    assert settings["retries"] == 5
    monkeypatch.setattr(dag, "render_day", lambda date: {"day": date})
    assert render(ds="2026-11-23") == {"day": "2026-11-23"}
    with pytest.raises(AirflowFailException, match="trigger the DAG with a logical date"):
        render()


def test_reading_the_file_needs_neither_ray_nor_this_package() -> None:
    code = "import sys, pytest; from helpers import airflow_stub; airflow_stub.load_dag(pytest.MonkeyPatch());"
    code += "sys.exit(any(name in sys.modules for name in ('ray', 'fsspec', 'flux_batch')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
    assert "flux_batch" not in DAG_FILE.read_text()


def test_a_run_that_is_done_gives_its_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_report(tmp_path, num_images=5)
    jobs = Jobs()

    assert render(jobs, monkeypatch, tmp_path) == {"num_images": 5}

    (job,) = jobs.submitted
    assert job["entrypoint"] == "flux-batch run s3://bucket/jobs/nightly.yaml --logical-date 2026-11-23"
    assert int(job["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > 25


def test_a_job_of_an_earlier_try_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_report(tmp_path)
    running = [
        SimpleNamespace(submission_id="done", metadata={"name": "flux-nightly-2026-11-23"}, status=JobStatus.FAILED),
        SimpleNamespace(submission_id="other", metadata={"name": "flux-nightly-2026-11-22"}, status=JobStatus.RUNNING),
    ]
    jobs = Jobs(running=[*running, SimpleNamespace(submission_id="bare", metadata=None, status=JobStatus.RUNNING)])
    render(jobs, monkeypatch, tmp_path)
    assert len(jobs.submitted) == 1

    lost = SimpleNamespace(submission_id="lost", metadata={"name": "flux-nightly-2026-11-23"}, status=JobStatus.RUNNING)
    jobs = Jobs(running=[*running, lost])
    render(jobs, monkeypatch, tmp_path)
    assert jobs.submitted == []


@pytest.mark.parametrize(
    ("status", "code", "error", "words"),
    [
        (
            JobStatus.FAILED,
            2,
            AirflowFailException,
            "the job file or its prompts are wrong, or a limit is reached: FAILED: so it was",
        ),
        (JobStatus.FAILED, 3, AirflowFailException, "2 of 5 images failed"),
        (JobStatus.FAILED, 75, RuntimeError, "the next try resumes it"),
        (JobStatus.FAILED, None, RuntimeError, "the next try resumes it"),
        (JobStatus.STOPPED, None, RuntimeError, "the next try resumes it"),
    ],
)
def test_what_no_repetition_mends_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: JobStatus, code: int, error: type[Exception], words: str
) -> None:
    write_report(tmp_path, num_images=5, num_failed=2)

    with pytest.raises(error, match=words):
        render(Jobs(status, code), monkeypatch, tmp_path)


def test_a_task_that_airflow_ends_stops_its_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs = Jobs(breaks=True)

    with pytest.raises(KeyboardInterrupt):
        render(jobs, monkeypatch, tmp_path)
    assert jobs.stopped == ["new"]


@pytest.mark.parametrize("error", [ConnectionError("refused"), RuntimeError("Request failed with status code 502")])
def test_a_job_server_that_does_not_answer_for_a_while_costs_no_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    write_report(tmp_path, num_images=5)
    jobs = Jobs(errors=[error] * 20)
    assert render(jobs, monkeypatch, tmp_path) == {"num_images": 5}
    assert jobs.stopped == []

    with pytest.raises(type(error)):
        render(Jobs(errors=[error] * 99), monkeypatch, tmp_path)
