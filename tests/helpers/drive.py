"""A driver to kill, stop and pause: `flux-batch run` with the fake pipeline, in a process of its own.

python drive.py JOB.yaml ENGINE [SECTION.KEY=VALUE | --OPTION[=VALUE] ...], where ENGINE is `local` or `ray`.
"""

from __future__ import annotations

import sys
from functools import partial

import helpers.no_sync  # noqa: F401
from flux_batch import cli, job
from flux_batch.engine.local import LocalEngine
from helpers.fakes import make_fake_pipeline


def main() -> int:
    path, engine, *settings = sys.argv[1:]
    local = LocalEngine() if engine == "local" else None
    job.run = partial(job.run, engine=local, make_pipeline=make_fake_pipeline)  # type: ignore[assignment]
    options = [word if word.startswith("--") else f"--set={word}" for word in settings]
    return cli.main(["run", path, *options])


if __name__ == "__main__":
    sys.exit(main())
