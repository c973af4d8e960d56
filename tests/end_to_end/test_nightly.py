"""The scheduled render with real processes: started twice, retried after midnight, and without new prompts."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.driver import Drive, Driver, Hold, commits, first_to_end, wait_for_commits
from helpers.job_files import data_files, write_prompts
from helpers.web_server import WebServer, web_server

JOB = """
name: nightly-{date}
prompts: {uri: PROMPTS}
output: {uri: RUNS, shard_size: 2}
model: {uri: demo}
sampling: {width: 16, height: 16, num_inference_steps: 2}
workers: {batch_size: 2}
"""
FIRST, SECOND = "2026-11-22", "2026-11-23"


def nightly(folder: Path, prompts: str = "prompts/{date}/", runs: str = "runs/{date}") -> Path:
    """Write the job file of a night, and prompts of two days: six shards each; the fourth can be held."""
    for day in (FIRST, SECOND):
        rows = [{"prompt": f"{day} {number}" + (" [hold]" if number == 6 else "")} for number in range(12)]
        write_prompts(folder / f"prompts/{day}/part.parquet", rows)
    text = JOB.replace("PROMPTS", json.dumps(f"{folder}/{prompts}")).replace("RUNS", json.dumps(f"{folder}/{runs}"))
    (folder / "nightly.yaml").write_text(text)
    return folder / "nightly.yaml"


@pytest.fixture
def night(drive: Drive) -> Drive:
    """Start the run of a night."""

    def start(job: Path, day: str, *options: str, **environment: str) -> Driver:
        return drive(job, f"--logical-date={day}T02:30:00+00:00", *options, **environment)

    return start


@pytest.fixture
def hold(tmp_path: Path) -> Hold:
    return Hold(tmp_path / "hold")


@pytest.fixture
def hook() -> Iterator[WebServer]:
    with web_server() as server:
        server.at("/hook", b"ok")
        yield server


def test_of_two_nights_started_at_once_one_renders_and_the_other_leaves_it_alone(
    tmp_path: Path, night: Drive, hold: Hold
) -> None:
    job = nightly(tmp_path)
    other, winner = first_to_end([night(job, FIRST, **hold.environment) for _ in range(2)])
    hold.release()
    code, err = other.end()
    assert (code, winner.end()[0]) == (75, 0)
    assert "is at work on this run" in err
    assert len(commits(tmp_path / f"runs/{FIRST}")) == 6
    assert night(job, FIRST).end()[0] == 0  # a scheduler retries 75, and the run is done


def test_a_retry_after_midnight_goes_on_with_the_day_it_retries(
    tmp_path: Path, night: Drive, hook: WebServer, hold: Hold
) -> None:
    job = nightly(tmp_path)
    address = {"FLUX_BATCH_WEBHOOK": f"{hook.url}/hook"}
    first = night(job, FIRST, **address, **hold.environment)
    hold.wait_for(first.pid)
    wait_for_commits(tmp_path / f"runs/{FIRST}", 3)
    first.stop()
    hold.release()
    assert first.end()[0] == 75
    before = {name: data for name, data in data_files(tmp_path / f"runs/{FIRST}").items() if name.startswith("train/")}
    assert 3 <= len(before) <= 4

    next_day, retry = night(job, SECOND), night(job, FIRST, **address)  # at the same time: two days are two runs
    assert (retry.end()[0], next_day.end()[0]) == (0, 0)

    after = data_files(tmp_path / f"runs/{FIRST}")
    assert before.items() <= after.items()
    assert len(commits(tmp_path / f"runs/{FIRST}")) == len(commits(tmp_path / f"runs/{SECOND}")) == 6
    told = [json.loads(body) for body in hook.posted]
    assert [one["exit_code"] for one in told] == [75, 0]
    assert "run the same command again" in told[0]["text"]
    assert told[1]["text"].startswith(f"nightly-{FIRST}: 12 images, 0 failed; ")
    assert told[1]["output"] == f"{tmp_path}/runs/{FIRST}"


def test_a_day_without_new_prompts(tmp_path: Path, night: Drive) -> None:
    """With --extend the command ends at once; as its own run, the day is an error that no retry can fix."""
    job = nightly(tmp_path, prompts="prompts/", runs="runs")
    assert night(job, FIRST, "--extend").end()[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    code, err = night(job, SECOND, "--extend").end()
    assert (code, "no prompt file is new" in err) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")} == before

    code, err = night(nightly(tmp_path), "2026-11-24").end()
    assert (code, "2026-11-24: no such prompts file or folder" in err) == (2, True)


def test_of_two_nights_that_extend_one_run_at_once_each_new_file_is_made_once(
    tmp_path: Path, night: Drive, hold: Hold
) -> None:
    job = nightly(tmp_path, prompts="prompts/", runs="runs")
    later = tmp_path / f"prompts/{SECOND}"
    later.rename(tmp_path / "later")
    assert night(job, FIRST, "--extend").end()[0] == 0
    (tmp_path / "later").rename(later)
    other, winner = first_to_end([night(job, SECOND, "--extend", **hold.environment) for _ in range(2)])
    hold.release()
    assert (other.end()[0], winner.end()[0]) == (75, 0)
    assert len(commits(tmp_path / "runs")) == 12
    assert night(job, SECOND, "--extend").end()[0] == 0
