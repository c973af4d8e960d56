import json
import logging
from pathlib import Path

import pytest

from flux_batch.logs import log_lines
from helpers.driver import Drive
from helpers.job_files import make_job, write_job

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
