"""One driver a run, shown on real processes: started together, paused, killed, stopped."""

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from driver import Driver, commits, wait_for_commits
from fakes import make_fake_pipeline
from flux_batch.config import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.engine.stop import Stop
from flux_batch.errors import Interrupted, RunHeld
from flux_batch.job import run
from flux_batch.storage.lease import Lease, read_holder
from flux_batch.storage.store import Store
from job_files import data_files, make_job, metadata, write_job
from s3 import Bucket

# Ten shards of two pictures, each 0.4 s: long enough to interfere, and short.
ROWS = [{"prompt": f"picture {number} [slow]"} for number in range(20)]
SECTIONS: dict[str, Any] = {"output": {"shard_size": 2}, "workers": {"batch_size": 2}}


def job_of(folder: Path, **failures: Any) -> tuple[JobConfig, Path]:
    config = make_job(folder, ROWS, **SECTIONS, failures=failures)
    return config, write_job(config, folder / "job.yaml")


def everything(output: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nobody disturbed leaves."""
    config = make_job(tmp_path_factory.mktemp("whole"), ROWS, **SECTIONS)
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    return data_files(Path(config.output.uri))


def test_of_two_drivers_started_together_one_runs_and_the_other_names_it(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    config, job = job_of(tmp_path)
    drivers = [Driver(job), Driver(job)]
    ends = {driver.pid: driver.end() for driver in drivers}
    assert sorted(code for code, _ in ends.values()) == [0, 75]
    (winner,) = (pid for pid, (code, _) in ends.items() if code == 0)
    (told,) = (err for code, err in ends.values() if code == 75)
    assert re.search(rf"{re.escape(str(tmp_path))}/out: \S+:{winner} is at work on this run, since .* UTC; let", told)
    assert data_files(tmp_path / "out") == whole
    assert [row["prompt"] for row in metadata(config)] == [row["prompt"] for row in ROWS]


def test_of_two_drivers_started_together_on_a_bucket_one_runs(tmp_path: Path, s3_store: Bucket) -> None:
    options = s3_store.storage_options
    endpoint = {"endpoint_url": options["endpoint_url"]}
    output = {"uri": f"{s3_store.uri}/run", "storage_options": endpoint, **SECTIONS["output"]}
    job = write_job(make_job(tmp_path, ROWS, output=output, workers=SECTIONS["workers"]), tmp_path / "job.yaml")
    keys = {"AWS_ACCESS_KEY_ID": options["key"], "AWS_SECRET_ACCESS_KEY": options["secret"]}
    drivers = [Driver(job, **keys), Driver(job, **keys)]
    ends = {driver.pid: driver.end() for driver in drivers}
    assert sorted(code for code, _ in ends.values()) == [0, 75]
    (winner,) = (pid for pid, (code, _) in ends.items() if code == 0)
    assert any(f":{winner} is at work on this run" in err for code, err in ends.values() if code == 75)
    store = Store(f"{s3_store.uri}/run", options)
    assert len(store.list("_run/commits")) == 10
    assert store.exists("_SUCCESS")


def test_a_driver_that_was_paused_past_its_lease_stops_before_it_writes(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    _, job = job_of(tmp_path, lease_ttl_s=1)
    output = tmp_path / "out"
    paused = Driver(job)
    wait_for_commits(output, 2)
    paused.send(signal.SIGSTOP)
    before = commits(output)
    assert len(before) < 10
    follower = Driver(job)
    code, err = follower.end()
    assert code == 0
    assert f":{paused.pid} gave no sign of life for 1 s; taking the run over" in err
    after = everything(output)
    paused.send(signal.SIGCONT)
    code, err = paused.end(timeout=20)
    assert code == 75
    assert f":{follower.pid} has taken this run over, since" in err
    assert everything(output) == after
    assert data_files(output) == whole


def test_a_paused_driver_that_wakes_while_the_other_is_at_work_leaves_it_the_run(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    _, job = job_of(tmp_path, lease_ttl_s=1)
    output = tmp_path / "out"
    paused = Driver(job)
    wait_for_commits(output, 2)
    paused.send(signal.SIGSTOP)
    count = len(commits(output))
    follower = Driver(job)
    wait_for_commits(output, count + 2)
    paused.send(signal.SIGCONT)
    assert paused.end(timeout=20)[0] == 75
    assert len(commits(output)) < 10, "the follower was done too soon for this test"
    assert follower.end()[0] == 0
    assert data_files(output) == whole


def test_after_a_kill_the_same_machine_goes_on_at_once(tmp_path: Path, whole: dict[str, bytes]) -> None:
    _, job = job_of(tmp_path, lease_ttl_s=600)
    output = tmp_path / "out"
    killed = Driver(job)
    wait_for_commits(output, 2)
    killed.send(signal.SIGKILL)  # and nobody reaps it: it stays in the table of processes
    done = commits(output)
    held = {name: (output / "_run/commits" / name).stat().st_mtime_ns for name in done}
    code, err = Driver(job).end()
    killed.process.communicate()
    assert code == 0
    assert "waiting" not in err
    assert {name: (output / "_run/commits" / name).stat().st_mtime_ns for name in held} == held
    assert data_files(output) == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_driver_keeps_what_is_done_and_gives_the_run_back(
    tmp_path: Path, whole: dict[str, bytes], number: signal.Signals
) -> None:
    config, job = job_of(tmp_path, lease_ttl_s=600)
    output = tmp_path / "out"
    driver = Driver(job)
    wait_for_commits(output, 2)
    driver.send(number)
    code, err = driver.end(timeout=20)
    assert code == 75
    count = len(commits(output))
    assert 2 <= count < 10
    assert f"stopped by {number.name}: {count} of 10 shards are committed; run the same command again" in err
    holder = read_holder(Store(config.output.uri))
    assert holder is not None
    assert (holder.process.pid, holder.is_released) == (driver.pid, True)
    assert f'"num_committed": {count},' in (output / "_run/progress.json").read_text()
    assert not (output / "_SUCCESS").exists()
    report = run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    assert (report.is_complete, report.num_new_images) == (True, 20 - 2 * count)
    assert data_files(output) == whole


def test_a_second_signal_leaves_in_the_middle_of_a_shard(tmp_path: Path) -> None:
    rows = [{"prompt": "one"}, {"prompt": "two [hang]"}]
    job = write_job(make_job(tmp_path, rows, output={"shard_size": 1}), tmp_path / "job.yaml")
    driver = Driver(job)
    wait_for_commits(tmp_path / "out", 1)
    driver.send(signal.SIGTERM)
    time.sleep(0.5)
    assert driver.process.poll() is None
    driver.send(signal.SIGTERM)
    code, err = driver.end(timeout=5)
    assert code == 75
    assert "SIGTERM after SIGTERM: leaving at once" in err
    assert commits(tmp_path / "out") == ["00000.json"]


def test_a_library_caller_stops_a_run_from_another_thread(tmp_path: Path) -> None:
    config, _ = job_of(tmp_path)
    stop = Stop()
    threading.Timer(1.0, stop.request, ["stopped by hand"]).start()
    with pytest.raises(Interrupted, match=r"stopped by hand: \d of 10 shards are committed"):
        run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline, stop=stop)
    holder = read_holder(Store(config.output.uri))
    assert holder is not None
    assert holder.is_released


def test_a_run_that_is_held_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config, _ = job_of(tmp_path)
    with Lease(Store(config.output.uri)):
        before = set(everything(tmp_path / "out"))
        with pytest.raises(RunHeld, match=f":{os.getpid()} is at work on this run"):
            run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
        assert set(everything(tmp_path / "out")) == before


def test_what_is_wrong_with_a_job_leaves_no_trace(tmp_path: Path) -> None:
    config = make_job(tmp_path, prompts={"passthrough": ["colour"]})
    with pytest.raises(Exception, match="colour"):
        run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    assert not (tmp_path / "out").exists()


def test_nothing_to_do_takes_no_lease(tmp_path: Path) -> None:
    config = make_job(tmp_path)
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    with Lease(Store(config.output.uri)):
        assert run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline).num_new_images == 0
