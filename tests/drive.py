"""A driver to kill: runs a job file with the fake pipeline in a process of its own.

python drive.py JOB.yaml ENGINE, where ENGINE is `local` or `ray`.
"""

from __future__ import annotations

import logging
import sys

from fakes import make_fake_pipeline
from flux_batch.engine.local import LocalEngine
from flux_batch.job import load_job, run


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path, engine = sys.argv[1:]
    report = run(load_job(path), engine=LocalEngine() if engine == "local" else None, make_pipeline=make_fake_pipeline)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
