"""The nightly render as a DAG of Airflow 3; also written for Airflow 2.9, but not tested there.

    cp jobs/airflow_dag.py "$AIRFLOW_HOME/dags/flux_nightly.py"      fill in your names first
    airflow dags test flux_nightly 2026-11-23

Submits jobs/nightly.yaml to a running Ray cluster, waits, and returns the report that the run wrote to its output. A
retry resumes the run of its day; an error that no retry can fix fails the task at once. Airflow's workers need
`ray[default]` in the version of the cluster and `fsspec` with `s3fs`; the cluster needs flux-batch.

The day is Airflow's `ds`, the same for every try: at 02:00 that same day in Airflow 3, the day before in Airflow 2
(see `[scheduler] create_cron_data_intervals`).
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

try:
    from airflow.sdk import dag, task
except ImportError:  # Airflow 2
    from airflow.decorators import dag, task
try:
    from airflow.sdk.exceptions import AirflowFailException
except ImportError:  # Airflow 2, and early 3
    from airflow.exceptions import AirflowFailException

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ADDRESS = "http://head:8265"
# The day of the run is appended.
COMMAND = ("flux-batch", "run", "s3://bucket/jobs/nightly.yaml", "--logical-date")
OUTPUT = "s3://bucket/runs/{date}"  # output.uri of the job file
# The 40 seconds between `ray job stop` and the kill exceed failures.drain_s. Workers do not ask the hub.
RUNTIME_ENV = {
    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "40", "HF_HUB_OFFLINE": "1", "RAY_LOGGING_CONFIG_ENCODING": "JSON"}
}
POLL_S = 10.0
# Failed requests in a row before giving up: five minutes.
MAX_UNANSWERED = 30
# Exit codes of flux-batch: the job file or the prompts are wrong, or a limit is reached; too many rows failed.
BAD_INPUT, TOO_MANY_FAILED = 2, 3


def submit(client: JobSubmissionClient, name: str, command: Sequence[str], runtime_env: Mapping[str, Any]) -> str:
    """Submit a job, unless one of that name is running, from an earlier try that Airflow lost.

    Returns: its submission id.
    """
    for job in client.list_jobs():
        if (job.metadata or {}).get("name") == name and not job.status.is_terminal():
            return str(job.submission_id)
    return client.submit_job(entrypoint=shlex.join(command), runtime_env=dict(runtime_env), metadata={"name": name})


def wait(client: JobSubmissionClient, submission_id: str, poll_s: float = POLL_S) -> tuple[int | None, str]:
    """Wait for the end of a job. Returns: the exit code of its driver, None if stopped, and Ray's message."""
    num_unanswered = 0
    while True:
        try:
            job = client.get_job_info(submission_id)
        except (OSError, RuntimeError):  # errors of the network, the server or a proxy: the job itself continues
            num_unanswered += 1
            if num_unanswered > MAX_UNANSWERED:
                raise
        else:
            num_unanswered = 0
            if job.status.is_terminal():
                return (0 if job.status == "SUCCEEDED" else job.driver_exit_code), f"{job.status}: {job.message}"
        time.sleep(poll_s)


def read_report(output: str) -> dict[str, Any]:
    """Read the report of a run, with the credentials of the environment."""
    import fsspec

    with fsspec.open(f"{output}/_run/report.json") as file:
        return dict(json.load(file))


def render_day(
    date: str,
    address: str = ADDRESS,
    command: Sequence[str] = COMMAND,
    output: str = OUTPUT,
    runtime_env: Mapping[str, Any] = RUNTIME_ENV,
    poll_s: float = POLL_S,
) -> dict[str, Any]:
    """Render the prompts of one day. Returns: the report of the run."""
    from ray.job_submission import JobSubmissionClient  # slow to import, and Airflow imports this file every 30 seconds

    client = JobSubmissionClient(address)
    submission_id = submit(client, f"flux-nightly-{date}", [*command, date], runtime_env)
    try:
        code, message = wait(client, submission_id, poll_s)
    except BaseException:  # Airflow stops this task
        client.stop_job(submission_id)
        raise
    if code == BAD_INPUT:
        raise AirflowFailException(
            f"{submission_id}: the job file or its prompts are wrong, or a limit is reached: {message}"
        )
    if code not in (0, TOO_MANY_FAILED):
        raise RuntimeError(f"{submission_id}: interrupted, the next try resumes it: {message}")
    report = read_report(output.format(date=date))
    if code == TOO_MANY_FAILED:
        raise AirflowFailException(f"{report['num_failed']} of {report['num_images']} images failed: see _run/failed")
    return report


@dag(dag_id="flux_nightly", schedule="0 2 * * *", start_date=datetime(2026, 1, 1), catchup=False, max_active_runs=1)
def flux_nightly() -> None:
    """Render the prompts of each day."""

    @task(retries=5, retry_delay=timedelta(minutes=5), execution_timeout=timedelta(hours=20))
    def render(ds: str | None = None) -> dict[str, Any]:
        """Render the day that Airflow passes, the same for every try."""
        if ds is None:  # as when a DAG is triggered by hand in Airflow 3
            raise AirflowFailException("which day? trigger the DAG with a logical date")
        return render_day(ds)

    render()


flux_nightly()
