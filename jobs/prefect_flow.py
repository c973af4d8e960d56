"""The nightly render as a Prefect flow; tested with Prefect 3.9.

    python jobs/prefect_flow.py            serves it every night at 02:00; fill in your names first

Prefect's machine needs flux-batch, and RAY_ADDRESS=head:6379 to run on a cluster. A retry resumes the run of its day;
an error that no retry can fix fails at once. A run that Prefect cancels puts its unfinished shards aside.
"""

import json
import subprocess
from collections.abc import Sequence
from typing import Any

from prefect import flow, runtime, task

COMMAND = ("flux-batch", "run", "s3://bucket/jobs/nightly.yaml", "--json", "--logical-date")  # the day is appended
# Exit codes of flux-batch: the job file or the prompts are wrong, or a limit is reached; too many rows failed.
FINAL = {
    2: "the job file or its prompts are wrong, or a limit is reached",
    3: "more rows failed than failures.max_ratio allows",
}


class CannotBeMended(Exception):
    """A failure that would happen again on a retry."""


def may_retry(task: Any, task_run: Any, state: Any) -> bool:
    """Return whether another try may succeed."""
    return not isinstance(state.result(raise_on_failure=False), CannotBeMended)


@task(retries=5, retry_delay_seconds=300, retry_condition_fn=may_retry)
def render_day(day: str, command: Sequence[str] = COMMAND) -> dict[str, Any]:
    """Render the prompts of one day. Returns: the report of the run."""
    with subprocess.Popen([*command, day], stdout=subprocess.PIPE, text=True) as process:
        try:
            out, _ = process.communicate()
        except BaseException:  # Prefect cancels this flow
            process.terminate()
            raise
    if process.returncode in FINAL:
        raise CannotBeMended(FINAL[process.returncode])
    if process.returncode:
        raise RuntimeError(f"flux-batch ended with {process.returncode}: the next try goes on")
    return dict(json.loads(out))


@flow(name="flux-nightly")
def flux_nightly(day: str | None = None) -> dict[str, Any]:
    """Render the prompts of a day: by default the scheduled day, which is the same for every try."""
    return render_day(day or runtime.flow_run.scheduled_start_time.date().isoformat())


if __name__ == "__main__":
    flux_nightly.serve(name="nightly", cron="0 2 * * *")
