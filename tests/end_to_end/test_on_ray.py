"""Whole runs on Ray, in processes of their own. One cluster serves all but the run of who has set nothing."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flux_batch.engine.local import LocalEngine
from flux_batch.images import read_provenance
from flux_batch.job import run
from helpers.driver import Drive, Hold, commits, wait_for_commits
from helpers.fakes import HOLD, make_fake_pipeline
from helpers.job_files import data_files, make_job, metadata, write_job
from helpers.raylets import raylets
from helpers.waiting import PATIENCE_S

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "jobs/ray_data_stage.py"


@dataclass(frozen=True)
class Ray:
    """A cluster with two logical GPUs, whose workers look into the folder of `hold`."""

    environment: dict[str, str]
    hold_folder: Path

    def hold(self) -> Hold:
        return Hold(self.hold_folder)


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    folder = tmp_path_factory.mktemp("hold")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOLD, str(folder))
        with raylets(0, num_cpus=2, num_gpus=2, include_log_monitor=True) as cluster:
            yield Ray({"RAY_ADDRESS": cluster.address}, folder)


def test_a_driver_killed_in_the_middle_goes_on_to_the_same_bytes(tmp_path: Path, drive: Drive, on_ray: Ray) -> None:
    # Of five shards, the third can be held in the middle.
    rows = [{"prompt": f"image {number}" + (" [hold]" if number == 10 else "")} for number in range(20)]
    whole = make_job(tmp_path / "whole", rows)
    assert run(whole, engine=LocalEngine(), make_pipeline=make_fake_pipeline).exit_code == 0

    config = make_job(tmp_path / "killed", rows)
    job = write_job(config, tmp_path / "killed/job.yaml")
    output, hold = tmp_path / "killed/out", on_ray.hold()
    driver = drive(job, engine="ray", **on_ray.environment)
    wait_for_commits(output, 2)
    driver.send(signal.SIGKILL)
    driver.process.wait()
    written = {name: (output / "_run/commits" / name).stat().st_mtime_ns for name in commits(output)}
    hold.release()
    assert 2 <= len(written) < 5
    assert not (output / "_SUCCESS").exists()

    code, err = drive(job, engine="ray", **on_ray.environment).end()
    assert (code, (output / "_SUCCESS").exists()) == (0, True), err
    assert data_files(output) == data_files(tmp_path / "whole/out")
    assert {name: (output / "_run/commits" / name).stat().st_mtime_ns for name in written} == written


def test_a_worker_that_dies_costs_nothing_and_programs_are_told_the_same_as_people(tmp_path: Path, on_ray: Ray) -> None:
    """A log line is an object where programs read it, the driver's and the workers', and it comes once."""
    rows = [{"prompt": f"image {number}" + (" [die once]" if number == 5 else "")} for number in range(16)]
    config = make_job(tmp_path, rows, model={"uri": str(tmp_path)}).model_copy(update={"name": "cats"})
    job = write_job(config, tmp_path / "job.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "helpers.drive", str(job), "ray"],
        env={**os.environ, **on_ray.environment, "RAY_LOGGING_CONFIG_ENCODING": "JSON"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    assert [row["prompt"] for row in metadata(config)] == [row["prompt"] for row in rows]
    assert {row["status"] for row in metadata(config)} == {"success"}

    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"asctime": ')]
    driver = [line for line in lines if line.get("name", "").startswith("flux_batch")]
    assert sum("shards to do" in line["message"] for line in lines) == 1
    assert {line["run"] for line in driver} == {"cats"}
    workers = [line for line in done.stdout.splitlines() + done.stderr.splitlines() if "4 images, 0 failed" in line]
    told = [json.loads(line[line.index("{") :]) for line in workers if "{" in line and "actor_id" in line]
    assert {(line["run"], line["shard"]) for line in told} == {("cats", shard) for shard in range(4)}


def test_sigterm_ends_a_run_with_75_and_the_same_command_goes_on(tmp_path: Path, drive: Drive, on_ray: Ray) -> None:
    config = make_job(
        tmp_path,
        [{"prompt": f"image {number}" + {2: " [hold]", 5: 90 * " long"}.get(number, "")} for number in range(6)],
        output={"shard_size": 2},
        model={"uri": "demo"},
        sampling={"width": 64, "height": 64, "num_inference_steps": 2, "t5_sequence_length": 32},
        workers={"max": 1, "num_cpus": 1},
    )
    job, hold = write_job(config, tmp_path / "job.yaml"), on_ray.hold()
    driver = drive(job, engine="ray", **on_ray.environment)
    wait_for_commits(tmp_path / "out", 1)
    driver.stop()  # in the second shard, where it is held
    hold.release()
    code, err = driver.end()
    assert code == 75
    assert re.search("stopped by SIGTERM: [12] of 3 shards are committed; run the same command again", err)

    # On with the model itself, where the fake one left off, as who has set nothing would, with a long TMPDIR.
    command = [sys.executable, "-m", "flux_batch", "run", str(job)]
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(folder), "TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_worker_niceness"] = "0"  # of those of conftest.py alone: beside other tests it would stand still
    finished = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
    assert (finished.returncode, "6 images, 0 failed" in finished.stdout) == (0, True), finished.stderr
    told = [line for line in finished.stderr.splitlines() if re.search(r"warning|pid=|\.py:", line, re.I)]
    # That the fake one computed otherwise, and nothing that nobody can do anything about.
    assert [line for line in told if "this worker computes" not in line] == []


def test_a_pipeline_of_ray_data_makes_the_images_of_the_job(tmp_path: Path, on_ray: Ray) -> None:
    """jobs/ray_data_stage.py, run as its first lines say, beside the job of the same settings."""
    rows = [{"id": f"row-{at}", "prompt": "a red circle", "seed": None if at % 2 else at, "tag": at} for at in range(4)]
    rows[3]["prompt"] = " "
    config = make_job(
        tmp_path,
        rows,
        output={"format": "files", "shard_size": 4},
        sampling={"width": 32, "height": 32, "t5_sequence_length": 16},
        model={"dtype": "float32"},
        workers={"max": 1},
    )
    assert run(config, engine=LocalEngine()).num_failed == 1
    of_job = metadata(config)
    job, output = write_job(config, tmp_path / "job.yaml"), tmp_path / "images"

    said = subprocess.run(
        [sys.executable, str(SCRIPT), str(job), str(output)],
        env={**os.environ, **on_ray.environment, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"},
        capture_output=True,
        text=True,
    )

    assert said.returncode == 0, said.stderr
    assert "1 failed, 3 success in" in said.stdout
    found = sorted(pq.read_table(output).to_pylist(), key=lambda row: row["id"])
    assert [row["tag"] for row in found] == list(range(4))
    for row, record in zip(found, of_job, strict=True):
        assert [row[name] for name in ("id", "seed", "width", "status")] == [
            record[name] for name in ("id", "seed", "width", "status")
        ]
        if record["status"] == "failed":
            assert "a prompt is needed" in row["error_message"]
            continue
        stored = (tmp_path / "out" / record["file_name"]).read_bytes()
        assert pixels(row["image"]) == pixels(stored)
        assert read_provenance(row["image"]) == {
            name: value for name, value in read_provenance(stored).items() if name != "key"
        }


def pixels(data: bytes) -> Any:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image).tobytes()
