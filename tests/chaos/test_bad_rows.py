"""Rows that do harm, all in one job on a cluster: the others are made, and each has its own reason on record."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from chaos.figures import Figures
from chaos.outputs import assert_verified, read_back
from chaos.paced_pipeline import made, model_folder
from helpers.job_files import make_job, write_job
from helpers.waiting import PATIENCE_S

DRIVE = Path(__file__).with_name("drive.py")
BATCH = 4
# In batches of four; the first two are in one batch, the others among good ones.
BAD = {5: " [die]", 6: " [raise]", 13: " [oom]", 18: " [hang]"}
ROWS = [{"prompt": f"image {number}{BAD.get(number, '')}"} for number in range(24)]
HANG_S = 3
# Of one that ends its process: in its batch, and twice alone; the same for one that hangs.
LOST_WORKERS = 6


@pytest.mark.ray
def test_each_bad_row_costs_itself_alone_and_says_why(tmp_path: Path, figures: Figures) -> None:
    model = model_folder(tmp_path / "model", 0.02)
    config = make_job(
        tmp_path,
        ROWS,
        output={"shard_size": 8},
        model={"uri": str(model)},
        workers={"batch_size": BATCH},
        failures={"hang_s": HANG_S, "max_ratio": 1.0},
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ended = subprocess.run(
        [sys.executable, str(DRIVE), str(write_job(config, tmp_path / "job.yaml"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        start_new_session=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    good = Counter(row["prompt"] for number, row in enumerate(ROWS) if BAD.get(number) in (None, " [oom]"))
    found = read_back(config, good, tmp_path / "scratch")
    redone = (made(model) - good).total()
    figures.add(
        experiment="rows that do harm",
        store="disk",
        images=len(ROWS),
        kills=LOST_WORKERS,
        faults=len(BAD),
        lost=found.lost,
        doubled=found.doubled,
        redone=redone,
    )
    assert (found.lost, found.doubled) == (0, 0)
    assert {prompt: kind for prompt, (kind, _) in found.failed.items()} == {
        "image 5 [die]": "WorkerLost",
        "image 6 [raise]": "RuntimeError",
        "image 18 [hang]": "WorkerLost",
    }
    reasons = {prompt: message for prompt, (_, message) in found.failed.items()}
    assert "its worker died" in reasons["image 5 [die]"]
    assert reasons["image 6 [raise]"].startswith("asked to fail")
    assert "no progress for" in reasons["image 18 [hang]"]
    # Of a batch that kills, the other images are made a second time at most.
    assert redone <= LOST_WORKERS * BATCH
    assert_verified(config)
