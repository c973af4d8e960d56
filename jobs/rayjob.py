"""The entry point of KubeRay's RayJob: runs a job file, and prevents useless retries.

    entrypoint: python /app/jobs/rayjob.py s3://bucket/jobs/cats.yaml       in cluster/kuberay/job/rayjob.yaml

Takes the same arguments as jobs/generate.py. A retry cannot change two exit codes: 2, the job file or its prompts are
wrong or a limit is reached, and 3, the run is finished but more rows failed than the job file allows. For these, it
asks Ray to stop this job, so that the RayJob is Complete with the job status STOPPED. KubeRay starts new clusters, up
to backoffLimit, only for a FAILED job. A job fails with every other code except 0, and the next cluster resumes the
run.
Source: kuberay 1.7, ray-operator/controllers/ray/rayjob_controller.go, checkBackoffLimitAndUpdateStatusIfNeeded.
"""

import json
import os
import sys
import time

from flux_batch.cli import main

# Exit codes of flux-batch that a retry would end with again.
FINAL = {
    2: "the job file or its prompts are wrong, or a limit is reached",
    3: "more rows failed than failures.max_ratio allows",
}
# Seconds to wait for Ray's SIGTERM; if it does not come, the job fails.
PATIENCE_S = 60


def stop_this_job() -> None:
    """Ask the job server to stop the job whose driver this process is. Raises: whatever Ray raises."""
    from ray.job_submission import JobSubmissionClient

    # Ray passes this variable to the driver of a job: ray/dashboard/modules/job/job_supervisor.py.
    job = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
    JobSubmissionClient().stop_job(job)


def exit_code(arguments: list[str]) -> int:
    """Run a job file. Returns: the exit code, if Ray does not end this process before."""
    try:
        code = main(["run", *arguments])
    except SystemExit as end:  # raised by the argument parser
        code = int(end.code or 0)
    if code in FINAL:
        print(f"rayjob.py: exit code {code}: {FINAL[code]}; stopping the job, which is not tried again", flush=True)
        try:
            stop_this_job()
        except Exception as error:  # of Ray or the network: each retry then ends with the same code, within a minute
            print(f"rayjob.py: the job could not be stopped: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(PATIENCE_S)  # if the process ended before Ray's signal, the job would count as failed
    return code


if __name__ == "__main__":
    sys.exit(exit_code(sys.argv[1:]))
