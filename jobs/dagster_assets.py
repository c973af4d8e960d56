"""The nightly render as a Dagster asset with daily partitions; tested with Dagster 1.13.

    dagster dev -f jobs/dagster_assets.py                                     fill in your names first
    dagster asset materialize -f jobs/dagster_assets.py --select images --partition 2026-11-23

Dagster's machine needs flux-batch, and RAY_ADDRESS=head:6379 to run on a cluster. A retry resumes the run of its day;
an error that no retry can fix fails at once. A run that Dagster stops puts its unfinished shards aside.
"""

import json
import subprocess
from collections.abc import Sequence
from typing import Any

import dagster as dg

COMMAND = ("flux-batch", "run", "s3://bucket/jobs/nightly.yaml", "--json", "--logical-date")  # the day is appended
# Exit codes of flux-batch: the job file or the prompts are wrong, or a limit is reached; too many rows failed.
FINAL = {
    2: "the job file or its prompts are wrong, or a limit is reached",
    3: "more rows failed than failures.max_ratio allows",
}


def render_day(day: str, command: Sequence[str] = COMMAND) -> dict[str, Any]:
    """Render the prompts of one day. Returns: the report of the run. Raises: Failure."""
    with subprocess.Popen([*command, day], stdout=subprocess.PIPE, text=True) as process:
        try:
            out, _ = process.communicate()
        except BaseException:  # Dagster stops this step
            process.terminate()
            raise
    if process.returncode in FINAL:
        raise dg.Failure(FINAL[process.returncode], allow_retries=False)
    if process.returncode:
        raise dg.Failure(f"flux-batch ended with {process.returncode}: the next try goes on")
    return dict(json.loads(out))


@dg.asset(
    partitions_def=dg.DailyPartitionsDefinition(start_date="2026-01-01"),
    retry_policy=dg.RetryPolicy(max_retries=5, delay=300),
)
def images(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    """Make the images of a day's prompts."""
    report = render_day(context.partition_key)
    shown = ("output", "num_images", "num_failed", "device_hours")
    return dg.MaterializeResult(metadata={name: report[name] for name in shown})


nightly = dg.build_schedule_from_partitioned_job(
    dg.define_asset_job("render", selection=[images]), hour_of_day=2, minute_of_hour=0
)
defs = dg.Definitions(assets=[images], schedules=[nightly])
