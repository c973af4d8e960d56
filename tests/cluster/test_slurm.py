"""cluster/slurm/run.sbatch with fakes of Slurm's programs: signals, exit codes, requeueing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from flux_batch.arguments import parser
from flux_batch.errors import Interrupted
from helpers.waiting import PATIENCE_S, wait_until

SCRIPT = Path(__file__).parents[2] / "cluster/slurm/run.sbatch"
# What stands in for each program; `$CALLS` has what it was called with.
PROGRAMS = {
    "scontrol": 'echo "scontrol $*" >> $CALLS; [ "$1" != show ] || printf "gpu07\\ngpu08\\n"',
    "squeue": "echo $STATE",
    # The code of a step whose other nodes were ended by a signal, not that of the driver.
    "srun": 'while [[ $1 == --* ]]; do shift; done; "$@"; exit 143',
    "ray": 'echo "ray $*" >> $CALLS; while [ "$1" != -- ]; do shift; done; shift; "$@"',
    # A driver: an end at once, or a wait for the signal which has it end as interrupted.
    "flux-batch": (
        'echo "flux-batch $RAY_ADDRESS $*" >> $CALLS; [ -z "$CODE" ] || exit $CODE\n'
        "trap 'echo driver: SIGTERM >> $CALLS; exit 75' TERM\necho ready >> $CALLS; while :; do sleep 0.05; done"
    ),
}


@contextmanager
def begun(folder: Path, code: int | None, state: str = "RUNNING") -> Iterator[subprocess.Popen[str]]:
    """Start the job, and end all its processes where it has not."""
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {"JOB_ID": "123456", "JOB_NODELIST": "gpu[07-08]", "JOB_NUM_NODES": "2", "CPUS_ON_NODE": "96"}
    variables = {f"SLURM_{name}": value for name, value in slurm.items()} | {"SLURM_GPUS_ON_NODE": "8"}
    variables |= {"CALLS": str(folder / "calls"), "CODE": "" if code is None else str(code), "TMPDIR": str(folder)}
    variables |= {"STATE": state}
    environment = {**os.environ, **variables, "PATH": f"{folder}:{os.environ['PATH']}"}
    words = ["bash", str(SCRIPT), "jobs/demo.yaml", "--set=output.uri=a folder"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


@pytest.mark.parametrize(
    ("code", "state", "is_requeued"),
    [
        (0, "RUNNING", False),
        (3, "RUNNING", False),
        (Interrupted.exit_code, "RUNNING", True),
        (143, "RUNNING", True),  # Slurm has ended the step by SIGTERM, to preempt the job
        (143, "COMPLETING", False),  # the job was cancelled
    ],
)
def test_a_job_ends_as_its_driver_does(tmp_path: Path, code: int, state: str, is_requeued: bool) -> None:
    with begun(tmp_path, code, state) as process:
        process.communicate(timeout=PATIENCE_S)

    assert process.returncode == code
    said = calls(tmp_path)
    (started,) = [line for line in said if line.startswith("ray ")]
    assert "--address gpu07:23456 --min-nodes 2 --num-cpus 96 --num-gpus 8 -- " in started
    assert "flux-batch gpu07:23456 run jobs/demo.yaml --set=output.uri=a folder" in said
    assert ("scontrol requeue 123456" in said) == is_requeued
    assert not [*tmp_path.glob("*.pid"), *tmp_path.glob("*.code")]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_of_slurm_stops_the_driver_in_order_and_requeues_the_job(tmp_path: Path, number: int) -> None:
    with begun(tmp_path, None) as process:
        wait_until(lambda: "ready" in calls(tmp_path))

        process.send_signal(number)
        out, _ = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == Interrupted.exit_code
    assert "the driver puts the unfinished shards aside" in out
    assert calls(tmp_path)[-2:] == ["driver: SIGTERM", "scontrol requeue 123456"]


def test_slurm_is_asked_for_what_the_script_relies_on() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SCRIPT.read_text(), flags=re.MULTILINE))
    assert options["ntasks-per-node"] == "1"
    assert {"requeue", "exclusive", "gres", "nodes", "time"} <= options.keys()
    assert options["open-mode"] == "append"  # otherwise the log of the first start is lost
    given = re.fullmatch(r"B:USR1@(\d+)", options["signal"])
    assert given
    assert int(given[1]) > 2 * 25  # failures.drain_s, and as long again to end the cluster
    for line in re.findall(r"run\.sbatch (jobs/.*|s3:.*)$", SCRIPT.read_text(), flags=re.MULTILINE):
        parser().parse_args(["run", *line.split()])
