"""One driver at a time per run, tested with real processes: started together, paused, killed, stopped."""

import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.engine.stop import Stop
from flux_batch.errors import Interrupted, RunHeld
from flux_batch.job import run
from flux_batch.output.lease import Lease, read_holder
from flux_batch.storage.store import Store
from helpers.driver import Drive, Driver, Hold, commits, first_to_end, wait_for_commits
from helpers.fakes import HOLD, make_fake_pipeline
from helpers.job_files import data_files, make_job, metadata, write_job
from helpers.s3 import Bucket
from helpers.waiting import wait_until

# Ten shards of two images; a held driver has made five shards, and is in the middle of the sixth.
ROWS = [{"prompt": f"image {number}" + (" [hold]" if number == 10 else "")} for number in range(20)]
SECTIONS: dict[str, Any] = {"output": {"shard_size": 2}, "workers": {"batch_size": 2}}
NUM_BEFORE = 5


def job_of(folder: Path, **failures: Any) -> tuple[JobConfig, Path]:
    config = make_job(folder, ROWS, **SECTIONS, failures=failures)
    return config, write_job(config, folder / "job.yaml")


def everything(output: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The data files of an undisturbed run."""
    config = make_job(tmp_path_factory.mktemp("whole"), ROWS, **SECTIONS)
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    return data_files(Path(config.output.uri))


@pytest.fixture
def hold(tmp_path: Path) -> Hold:
    return Hold(tmp_path / "hold")


def start_held(drive: Drive, job: Path, hold: Hold, *, is_child: bool = False) -> Driver:
    """Start a driver. Returns: the driver, held in the middle of the sixth shard."""
    driver = drive(job, is_child=is_child, **hold.environment)
    hold.wait_for(driver.pid)
    wait_for_commits(job.parent / "out", NUM_BEFORE)
    return driver


@pytest.fixture
def paused(tmp_path: Path, drive: Drive, hold: Hold) -> Driver:
    """A driver that is paused in the middle of the sixth shard, with a lease of a second."""
    _, job = job_of(tmp_path, lease_ttl_s=1)
    driver = start_held(drive, job, hold)
    driver.send(signal.SIGSTOP)
    return driver


def wake(driver: Driver, hold: Hold) -> tuple[int, str]:
    """Wake a paused driver; release it once it knows of the other. Returns: its exit code and stderr."""
    driver.send(signal.SIGCONT)
    wait_until(lambda: "has taken this run over" in driver.said, lambda: driver.said)
    hold.release()
    return driver.end()


def test_of_two_drivers_started_together_one_runs_and_the_other_names_it(
    tmp_path: Path, drive: Drive, hold: Hold, whole: dict[str, bytes]
) -> None:
    config, job = job_of(tmp_path)
    other, winner = first_to_end([drive(job, **hold.environment) for _ in range(2)])
    hold.release()
    code, told = other.end()
    assert (code, winner.end()[0]) == (75, 0)
    assert re.search(
        rf"{re.escape(str(tmp_path))}/out: \S+:{winner.pid} is at work on this run, since .* UTC; let", told
    )
    assert data_files(tmp_path / "out") == whole
    assert [row["prompt"] for row in metadata(config)] == [row["prompt"] for row in ROWS]


def test_of_two_drivers_started_together_on_a_bucket_one_runs(
    tmp_path: Path, drive: Drive, hold: Hold, s3_store: Bucket
) -> None:
    options = s3_store.storage_options
    endpoint = {"endpoint_url": options["endpoint_url"]}
    output = {"uri": f"{s3_store.uri}/run", "storage_options": endpoint, **SECTIONS["output"]}
    job = write_job(make_job(tmp_path, ROWS, output=output, workers=SECTIONS["workers"]), tmp_path / "job.yaml")
    keys = {"AWS_ACCESS_KEY_ID": options["key"], "AWS_SECRET_ACCESS_KEY": options["secret"]}
    other, winner = first_to_end([drive(job, **keys, **hold.environment) for _ in range(2)])
    hold.release()
    code, told = other.end()
    assert (code, winner.end()[0]) == (75, 0)
    assert f":{winner.pid} is at work on this run" in told
    store = Store(f"{s3_store.uri}/run", options)
    assert len(store.list("_run/commits")) == 10
    assert store.exists("_SUCCESS")


def test_a_driver_that_was_paused_past_its_lease_stops_before_it_writes(
    tmp_path: Path, drive: Drive, hold: Hold, paused: Driver, whole: dict[str, bytes]
) -> None:
    output = tmp_path / "out"
    follower = drive(tmp_path / "job.yaml")
    code, err = follower.end()
    assert code == 0
    assert f":{paused.pid} gave no sign of life for 1 s; taking the run over" in err
    after = everything(output)
    code, err = wake(paused, hold)
    assert code == 75
    assert f":{follower.pid} has taken this run over, since" in err
    assert everything(output) == after
    assert data_files(output) == whole


def test_a_paused_driver_that_wakes_while_the_other_is_at_work_leaves_it_the_run(
    tmp_path: Path, drive: Drive, hold: Hold, paused: Driver, whole: dict[str, bytes]
) -> None:
    output = tmp_path / "out"
    hold_of_follower = Hold(tmp_path / "hold of follower")
    follower = start_held(drive, tmp_path / "job.yaml", hold_of_follower)
    assert wake(paused, hold)[0] == 75
    assert len(commits(output)) <= NUM_BEFORE + 1  # its current shard, with the same bytes from either driver
    assert not (output / "_SUCCESS").exists()
    hold_of_follower.release()
    assert follower.end()[0] == 0
    assert data_files(output) == whole


def test_after_a_kill_the_same_machine_goes_on_at_once(
    tmp_path: Path, drive: Drive, hold: Hold, whole: dict[str, bytes]
) -> None:
    _, job = job_of(tmp_path, lease_ttl_s=600)
    output = tmp_path / "out"
    killed = start_held(drive, job, hold, is_child=True)
    killed.send(signal.SIGKILL)  # it is not reaped, so it stays in the process table
    done = {name: (output / "_run/commits" / name).stat().st_mtime_ns for name in commits(output)}
    code, err = drive(job).end()
    assert code == 0
    assert "checking whether it is alive" not in err
    assert {name: (output / "_run/commits" / name).stat().st_mtime_ns for name in done} == done
    assert data_files(output) == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_driver_keeps_what_is_done_and_gives_the_run_back(
    tmp_path: Path, drive: Drive, hold: Hold, whole: dict[str, bytes], number: signal.Signals
) -> None:
    config, job = job_of(tmp_path, lease_ttl_s=600)
    output = tmp_path / "out"
    driver = start_held(drive, job, hold)
    driver.stop(number)
    hold.release()
    code, err = driver.end()
    assert code == 75
    count = len(commits(output))
    assert NUM_BEFORE <= count <= NUM_BEFORE + 1
    assert f"stopped by {number.name}: {count} of 10 shards are committed; run the same command again" in err
    holder = read_holder(Store(config.output.uri))
    assert holder is not None
    assert (holder.process.pid, holder.is_released) == (driver.pid, True)
    assert f'"num_committed": {count},' in (output / "_run/progress.json").read_text()
    assert not (output / "_SUCCESS").exists()
    report = run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    assert (report.is_complete, report.num_new_images) == (True, 20 - 2 * count)
    assert data_files(output) == whole


def test_a_second_signal_leaves_in_the_middle_of_a_shard(tmp_path: Path, drive: Drive, hold: Hold) -> None:
    _, job = job_of(tmp_path)
    driver = start_held(drive, job, hold)
    driver.stop()
    driver.send(signal.SIGTERM)
    code, err = driver.end()
    assert code == 75
    assert "SIGTERM after SIGTERM: exiting at once" in err
    assert len(commits(tmp_path / "out")) == NUM_BEFORE


def test_a_library_caller_stops_a_run_from_another_thread(
    tmp_path: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = job_of(tmp_path)
    monkeypatch.setenv(HOLD, hold.environment[HOLD])
    stop = Stop()

    def stop_in_the_middle() -> None:
        hold.wait_for(os.getpid())
        stop.request("stopped by hand")
        hold.release()

    caller = threading.Thread(target=stop_in_the_middle)
    caller.start()
    with pytest.raises(Interrupted, match=r"stopped by hand: [56] of 10 shards are committed"):
        run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline, stop=stop)
    caller.join()
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
