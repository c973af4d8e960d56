"""A driver to kill, stop and pause: `flux-batch run` with the fake pipeline, in its own process.

python drive.py JOB.yaml ENGINE [SECTION.KEY=VALUE | --OPTION[=VALUE] ...], where ENGINE is `local` or `ray`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import helpers.no_sync  # noqa: F401
from flux_batch import cli, job
from flux_batch.engine.local import LocalEngine
from helpers.fakes import make_fake_pipeline


def be_driver(
    main: Callable[[Sequence[str]], int], words: Sequence[str], environment: Mapping[str, str], folder: str, said: str
) -> None:
    """Run `main(words)` as a driver in this forked process, with its stderr appended to the file `said`."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), 2)
    sys.exit(main(words))


def main(words: Sequence[str]) -> int:
    path, engine, *settings = words
    local = LocalEngine() if engine == "local" else None
    job.run = partial(job.run, engine=local, make_pipeline=make_fake_pipeline)  # type: ignore[assignment]
    options = [word if word.startswith("--") else f"--set={word}" for word in settings]
    return cli.main(["run", path, *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
