import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from flux_batch.logs import log_lines
from helpers.driver import Drive
from helpers.job_files import make_job, write_job
from helpers.waiting import PATIENCE_S

log = logging.getLogger("flux_batch.somewhere")


def test_programs_get_an_object_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_LOGGING_CONFIG_ENCODING", "JSON")
    with log_lines(logging.INFO):
        log.info("s3://me:secret@b/x\n\x1b[31m", extra={"shard": 3, "key": "000030001", "other": object()})
        log.debug("unseen")
    log.info("after")
    (line,) = capsys.readouterr().err.splitlines()
    body = json.loads(line)
    assert body.pop("asctime").endswith("+00:00")
    assert "secret" not in body["message"]
    assert "\x1b" not in body.pop("message")
    assert body == {"levelname": "INFO", "name": "flux_batch.somewhere", "shard": 3, "key": "000030001"}


def test_a_run_tells_programs_its_name_its_shards_and_its_end(tmp_path: Path, drive: Drive) -> None:
    rows = [{"prompt": "[raise]"}] + [{"prompt": f"image {number}"} for number in range(5)]
    job = write_job(make_job(tmp_path, rows).model_copy(update={"name": "cats"}), tmp_path / "job.yaml")
    code, err = drive(job, RAY_LOGGING_CONFIG_ENCODING="JSON").end()
    lines = [json.loads(line) for line in err.splitlines()]
    assert code == 3
    assert {line["run"] for line in lines} == {"cats"}
    assert {line.get("shard") for line in lines} == {0, 1, None}
    assert [line["key"] for line in lines if "key" in line] == ["000000000"]
    code, err = drive(job, "sampling.seed=1", RAY_LOGGING_CONFIG_ENCODING="JSON").end()
    last = json.loads(err.splitlines()[-1])
    assert (code, last["exit_code"], last["levelname"]) == (2, 2, "ERROR")
    assert "sampling.seed: 0 -> 1" in last["message"]


@pytest.mark.ray
def test_workers_on_ray_tell_programs_the_same_and_the_driver_tells_it_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"image {number}"} for number in range(8)]
    config = make_job(tmp_path, rows, workers={"num_gpus": 0}).model_copy(update={"name": "cats"})
    job = write_job(config, tmp_path / "job.yaml")
    script = (
        "import os, sys; os.environ['RAY_LOGGING_CONFIG_ENCODING'] = 'JSON'; from helpers import drive; "
        f"sys.argv = ['drive.py', {str(job)!r}, 'ray']; sys.exit(drive.main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"asctime": ')]
    driver = [line for line in lines if line.get("name", "").startswith("flux_batch")]
    assert sum("shards to do" in line["message"] for line in lines) == 1
    assert {line["run"] for line in driver} == {"cats"}
    workers = [line for line in done.stdout.splitlines() + done.stderr.splitlines() if "4 images, 0 failed" in line]
    told = [json.loads(line[line.index("{") :]) for line in workers if "{" in line and "actor_id" in line]
    assert {(line["run"], line["shard"]) for line in told} == {("cats", 0), ("cats", 1)}
