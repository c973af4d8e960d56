"""The entry point for `ray job submit`: runs a job file on that cluster.

    ray job submit --working-dir . -- python jobs/generate.py jobs/demo.yaml --set output.uri=s3://bucket/runs/demo
    ray job submit --working-dir . -- python jobs/generate.py s3://bucket/jobs/nightly.yaml --logical-date 2026-11-23

Takes the same arguments as `flux-batch run` and exits with the same codes; the job file is a path in the working
folder, or an address. `ray job stop` sends SIGTERM, and the run then ends in order within `failures.drain_s` (25 s).
But Ray kills it after 3 s unless the job was submitted with a longer wait, as jobs/submit.sh does.
"""

import sys

from flux_batch.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
