from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flux_batch.engine.local import LocalEngine
from flux_batch.job import run
from flux_batch.output.lease import Holder
from flux_batch.output.process_id import ProcessId
from flux_batch.report.progress.status import format_status, read_status
from flux_batch.storage.store import Store
from helpers.fakes import make_fake_pipeline
from helpers.job_files import make_job

HOLDER = Holder(
    epoch=7,
    id="x",
    process=ProcessId(host="node-7", boot="", namespace="", pid=4242, started=""),
    ttl_s=60,
    since_unix_time=1000,
    seen_unix_time=1300,
)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("unfinished")
    run(make_job(folder), engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    (folder / "out/_run/commits/00001.json").unlink()
    (folder / "out/_SUCCESS").unlink()
    return Store(str(folder / "out"))


@pytest.mark.parametrize(
    ("fields", "now", "line"),
    [
        ({}, 1304, "driver   node-7:4242 for 5 min 4 s, last sign of life 4 s ago"),
        ({}, 900, "driver   node-7:4242 for 0 s, last sign of life 0 s ago"),  # whose clock is ahead of ours
        (
            {},
            1400,
            "driver   node-7:4242 for 6 min 40 s, last sign of life 1 min 40 s ago: "
            "it seems to be gone; `run` takes over",
        ),
        ({"is_released": True}, 1304, "driver   none; the last was node-7:4242"),
    ],
)
def test_status_says_who_has_the_run(unfinished: Store, fields: dict[str, Any], now: float, line: str) -> None:
    unfinished.write("_run/lease/00007.json", replace(HOLDER, **fields).to_json())
    status = read_status(unfinished)
    assert (status["driver"]["name"], status["driver"]["epoch"]) == ("node-7:4242", 7)
    assert status["driver"]["is_at_work"] is not fields.get("is_released", False)
    assert format_status(status, now).splitlines()[-1] == line


def test_a_complete_run_needs_no_driver(tmp_path: Path) -> None:
    run(make_job(tmp_path), engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    assert "driver" not in format_status(read_status(Store(str(tmp_path / "out"))))
