"""A driver for the experiments: `flux-batch run` with the paced pipeline, in its own process.

python drive.py JOB.yaml [local | ray] [in-parts] [--OPTION ...]

With `local` it runs on the local engine, else on Ray. With `in-parts`, every put-if-absent sends its object in parts if
the store ignores conditions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import helpers.no_sync  # noqa: F401
from chaos.paced_pipeline import make_paced_pipeline
from flux_batch import cli, job
from flux_batch.engine.local import LocalEngine
from flux_batch.storage import store

WORDS = ("local", "ray", "in-parts")


def main(words: Sequence[str]) -> int:
    path, *words = words
    local = LocalEngine(backoff_s=0.5) if "local" in words else None
    if "in-parts" in words:
        store.LOOK_LATE_BYTES = 0
    job.run = partial(job.run, engine=local, make_pipeline=make_paced_pipeline)  # type: ignore[assignment]
    return cli.main(["run", path, *(word for word in words if word not in WORDS)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
