"""Real processes, really killed; what they leave must go on to the same bytes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from driver import DRIVE, wait_for_commits
from fakes import DEATH_EXIT
from job_files import data_files, make_job, metadata, write_job

ROWS = [{"prompt": f"picture {number} [slow]"} for number in range(20)]


def start(job: Path, engine: str) -> subprocess.Popen[bytes]:
    """Start a driver in a process group of its own, so that its local cluster goes down with it."""
    return subprocess.Popen([sys.executable, str(DRIVE), str(job), engine], start_new_session=True)


def finish(job: Path, engine: str) -> None:
    assert start(job, engine).wait(timeout=90) == 0


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_driver_killed_in_the_middle_goes_on_to_the_same_bytes(tmp_path: Path, engine: str) -> None:
    whole = make_job(tmp_path / "whole", ROWS)
    finish(write_job(whole, tmp_path / "whole/job.yaml"), "local")

    config = make_job(tmp_path / "killed", ROWS)
    job = write_job(config, tmp_path / "killed/job.yaml")
    output = tmp_path / "killed/out"
    driver = start(job, engine)
    wait_for_commits(output, 2)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    committed = {path.name: path.stat().st_mtime_ns for path in (output / "_run/commits").iterdir()}
    assert 2 <= len(committed) < 5
    assert not (output / "_SUCCESS").exists()

    finish(job, engine)
    assert data_files(output) == data_files(tmp_path / "whole/out")
    assert {name: (output / "_run/commits" / name).stat().st_mtime_ns for name in committed} == committed
    assert (output / "_SUCCESS").exists()


def test_a_process_that_dies_within_a_shard_leaves_what_it_made(tmp_path: Path) -> None:
    rows = [{"prompt": f"picture {number}" + (" [die once]" if number == 7 else "")} for number in range(10)]
    whole, killed = (
        make_job(tmp_path / name, rows, output={"shard_size": 10}, model={"uri": str(tmp_path)})
        for name in ("whole", "killed")
    )
    (tmp_path / "died").touch()
    finish(write_job(whole, tmp_path / "whole/job.yaml"), "local")
    (tmp_path / "died").unlink()

    job = write_job(killed, tmp_path / "killed/job.yaml")
    assert start(job, "local").wait(timeout=90) == DEATH_EXIT
    # Of three batches made, the third may have been on its way.
    assert len(list((tmp_path / "killed/out/_run/staging/00000").iterdir())) in (2, 3)
    finish(job, "local")

    assert data_files(tmp_path / "killed/out") == data_files(tmp_path / "whole/out")
    assert not (tmp_path / "killed/out/_run/staging").exists()


@pytest.mark.ray
def test_a_worker_that_dies_in_the_middle_costs_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": f"picture {number}" + (" [die once]" if number == 5 else "")} for number in range(16)]
    config = make_job(tmp_path, rows, model={"uri": str(tmp_path)})
    finish(write_job(config, tmp_path / "job.yaml"), "ray")
    assert (tmp_path / "died").exists()
    assert [row["prompt"] for row in metadata(config)] == [row["prompt"] for row in rows]
    assert {row["status"] for row in metadata(config)} == {"success"}
