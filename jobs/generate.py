"""The entry point for `ray job submit`: runs a job file on the cluster that the job was submitted to.

    ray job submit --working-dir . -- python jobs/generate.py jobs/demo.yaml --set output.uri=s3://bucket/runs/demo

Takes the same arguments as `flux-batch run` and exits with the same codes.
"""

import sys

from flux_batch.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
