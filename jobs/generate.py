"""The entry point for `ray job submit`: runs a job file on the cluster that the job was submitted to.

    ray job submit --working-dir . -- python jobs/generate.py jobs/demo.yaml --set output.uri=s3://bucket/runs/demo

Takes the same arguments as `flux-batch run` and exits with the same codes. `ray job stop` sends SIGTERM, on which the
run ends in order within `failures.drain_s` (25 s), but Ray kills it after 3 s unless the job was submitted with

    --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "40"}}'
"""

import sys

from flux_batch.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
