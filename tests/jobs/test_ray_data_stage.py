"""The pipeline of jobs/ray_data_stage.py, run as its first lines say, beside the job of the same settings."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flux_batch.engine.local import LocalEngine
from flux_batch.images import read_provenance
from flux_batch.job import run
from helpers.job_files import make_job, metadata, write_job

SCRIPT = Path(__file__).parents[2] / "jobs/ray_data_stage.py"


def pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image).tobytes()


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_pipeline_makes_the_images_of_the_job(tmp_path: Path) -> None:
    rows = [{"id": f"row-{at}", "prompt": "a red circle", "seed": None if at % 2 else at, "tag": at} for at in range(6)]
    rows[3]["prompt"] = " "
    config = make_job(
        tmp_path,
        rows,
        output={"format": "files", "shard_size": 6},
        sampling={"width": 32, "height": 32, "t5_sequence_length": 16},
        model={"dtype": "float32"},
        workers={"max": 1},
    )
    assert run(config, engine=LocalEngine()).num_failed == 1
    of_job = metadata(config)
    job, output = write_job(config, tmp_path / "job.yaml"), tmp_path / "images"

    said = subprocess.run(
        [sys.executable, str(SCRIPT), str(job), str(output)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), os.environ["PYTHONPATH"]])},
        capture_output=True,
        text=True,
    )

    assert said.returncode == 0, said.stderr
    assert "1 failed, 5 success in" in said.stdout
    found = sorted(pq.read_table(output).to_pylist(), key=lambda row: row["id"])
    assert [row["tag"] for row in found] == list(range(6))
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
