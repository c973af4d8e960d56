from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flux_batch.engine.local import LocalEngine
from flux_batch.job import run
from flux_batch.output.lease import Holder
from flux_batch.output.process_id import ProcessId
from flux_batch.report.progress.status import format_status, read_status, watch_status
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
        ({}, 900, "driver   node-7:4242 for 0 s, last sign of life 0 s ago"),  # the driver's clock is ahead of ours
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
    status = read_status(unfinished, now)
    assert status["state"] == ("stopped" if fields else "dead" if now > 1360 else "running")
    assert (status["driver"]["name"], status["driver"]["epoch"]) == ("node-7:4242", 7)
    assert status["driver"]["is_at_work"] is not fields.get("is_released", False)
    assert format_status(status, now).splitlines()[-1] == line


@pytest.mark.parametrize("text", ["[1, 2]", "null", "{", ""])
def test_what_a_report_does_not_say_is_read_from_the_commits(tmp_path: Path, text: str) -> None:
    run(make_job(tmp_path), engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    store = Store(str(tmp_path / "out"))
    for name in ("progress.json", "precision.json"):
        store.write(f"_run/{name}", text.encode())
    status = read_status(store)
    assert (status["num_images"], status["progress"], status["precision"]) == (10, None, None)


def test_a_complete_run_needs_no_driver(tmp_path: Path) -> None:
    run(make_job(tmp_path), engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    assert "driver" not in format_status(read_status(Store(str(tmp_path / "out"))))


def test_a_run_whose_driver_was_killed_is_not_called_running(unfinished: Store) -> None:
    gone = replace(ProcessId.own(), pid=2**22 + 1)
    for process, state in ((ProcessId.own(), "running"), (gone, "dead")):
        holder = replace(HOLDER, epoch=8, process=process, seen_unix_time=1e10)
        unfinished.write("_run/lease/00008.json", holder.to_json())
        status = read_status(unfinished)
        assert status["state"] == state
    assert "dead: its driver gives no sign of life; run the same command" in format_status(status)
    unfinished.delete("_run/lease/00008.json")


def test_status_says_why_images_failed_and_a_watcher_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": text} for text in ("fine", "[raise]", None, "[raise]", "fine")]
    config = make_job(tmp_path, rows, failures={"max_ratio": 1})
    report = run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    store = Store(str(tmp_path / "out"))
    status = read_status(store)
    assert status["failures"] == {"RuntimeError": 2, "RowError": 1}
    assert report.examples == status["examples"]
    lines = format_status(status).splitlines()
    assert any(line.startswith("failed   2 RuntimeError, first 000000001: asked to fail") for line in lines)
    assert lines[-1] == "state    complete"
    commit = store.read("_run/commits/00001.json")
    for key in ("_SUCCESS", "_run/commits/00001.json"):
        store.delete(key)
    said: list[str] = []

    def finish(seconds: float) -> None:
        store.write("_run/commits/00001.json", commit)
        store.write("_SUCCESS", b"")

    monkeypatch.setattr("flux_batch.report.progress.status.time.sleep", finish)
    watch_status(store, None, said.append)
    assert said[0].startswith("stopped: 4 of 5 images (")
    assert said[1].startswith("complete: 5 of 5 images (3 failed); ")
    assert said[2].splitlines()[-1] == "state    complete"
