"""Real processes are killed; the resumed run must end in the same bytes."""

import signal
from pathlib import Path

from helpers.driver import Drive, Hold, wait_for_commits
from helpers.fakes import DEATH_EXIT
from helpers.job_files import data_files, make_job, write_job

# Five shards; the third can be held in the middle.
ROWS = [{"prompt": f"image {number}" + (" [hold]" if number == 10 else "")} for number in range(20)]


def test_a_driver_killed_in_the_middle_goes_on_to_the_same_bytes(tmp_path: Path, drive: Drive) -> None:
    whole = make_job(tmp_path / "whole", ROWS)
    assert drive(write_job(whole, tmp_path / "whole/job.yaml")).end()[0] == 0

    config = make_job(tmp_path / "killed", ROWS)
    job = write_job(config, tmp_path / "killed/job.yaml")
    output = tmp_path / "killed/out"
    hold = Hold(tmp_path / "hold")
    driver = drive(job, **hold.environment)
    wait_for_commits(output, 2)
    driver.send(signal.SIGKILL)
    driver.process.wait()
    hold.release()
    committed = {path.name: path.stat().st_mtime_ns for path in (output / "_run/commits").iterdir()}
    assert 2 <= len(committed) < 5
    assert not (output / "_SUCCESS").exists()

    assert drive(job).end()[0] == 0
    assert data_files(output) == data_files(tmp_path / "whole/out")
    assert {name: (output / "_run/commits" / name).stat().st_mtime_ns for name in committed} == committed
    assert (output / "_SUCCESS").exists()


def test_a_process_that_dies_within_a_shard_leaves_what_it_made(tmp_path: Path, drive: Drive) -> None:
    rows = [{"prompt": f"image {number}" + (" [die once]" if number == 7 else "")} for number in range(10)]
    whole, killed = (
        make_job(tmp_path / name, rows, output={"shard_size": 10}, model={"uri": str(tmp_path)})
        for name in ("whole", "killed")
    )
    (tmp_path / "died").touch()
    assert drive(write_job(whole, tmp_path / "whole/job.yaml")).end()[0] == 0
    (tmp_path / "died").unlink()

    job = write_job(killed, tmp_path / "killed/job.yaml")
    assert drive(job).end()[0] == DEATH_EXIT
    # Three batches are made, but the third may not be staged yet.
    assert len(list((tmp_path / "killed/out/_run/staging/00000").iterdir())) in (2, 3)
    assert drive(job).end()[0] == 0

    assert data_files(tmp_path / "killed/out") == data_files(tmp_path / "whole/out")
    assert not (tmp_path / "killed/out/_run/staging").exists()
