"""Two drivers of one run, on each store: started at once, or one paused past its lease.

tests/end_to_end/test_job_lease.py tests each case on the disk in more detail; these tests cover every store, with
figures.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chaos.driver import PacedDriver
from chaos.figures import Figures
from chaos.outputs import assert_verified, keys_of, read_back, store_of
from chaos.paced_pipeline import held, made, model_folder
from flux_batch.config.schema import JobConfig
from flux_batch.storage.store import Store
from helpers.counting_proxy import counting_proxy
from helpers.driver import first_to_end
from helpers.job_files import make_job, write_job
from helpers.s3 import S3Server
from helpers.waiting import wait_until

BATCH = 2
ROWS = [{"prompt": f"image {number}"} for number in range(24)]
WANTED = Counter(row["prompt"] for row in ROWS)
NUM_SHARDS = 6
PACE_S = 0.02
# The shortest valid lease, so that a pause soon outlasts it.
TTL_S = 1


class Scene:
    """One run, and drivers for it: processes on the local engine."""

    def __init__(self, name: str, folder: Path, server: S3Server | None) -> None:
        self.store_name = name
        self.model = model_folder(folder / "model", PACE_S)
        self.folder = folder
        self.output = f"{server.make_bucket()}/run" if server else str(folder / "out")
        options = server.storage_options if server else {}
        public = {key: value for key, value in options.items() if key == "endpoint_url"}
        self._environment: dict[str, str] = {}
        if options:
            self._environment = {"AWS_ACCESS_KEY_ID": options["key"], "AWS_SECRET_ACCESS_KEY": options["secret"]}
        self.config = self._job(options)
        self.file = write_job(self._job(public), folder / "job.yaml")

    def _job(self, options: dict[str, Any]) -> JobConfig:
        return make_job(
            self.folder,
            ROWS,
            output={"uri": self.output, "storage_options": options, "shard_size": 4},
            model={"uri": str(self.model)},
            workers={"batch_size": BATCH},
            failures={"lease_ttl_s": TTL_S},
        )

    @property
    def store(self) -> Store:
        return store_of(self.config)

    def start(self, *options: str) -> PacedDriver:
        return PacedDriver(self.file, *options, **self._environment)

    def num_commits(self) -> int:
        return len(self.store.list("_run/commits"))

    def wait_for_commits(self, count: int) -> None:
        wait_until(lambda: self.num_commits() >= count)

    def everything(self) -> dict[str, bytes]:
        """Read every object except the first lease, whose heartbeat may be under way when its driver is paused."""
        return {key: self.store.read(key) for key in keys_of(self.store) if key != "_run/lease/00001.json"}

    def judge(self, figures: Figures, experiment: str, *, kills: int = 0, may_redo: int = 0) -> None:
        found = read_back(self.config, WANTED, self.folder / "scratch")
        redone = (made(self.model) - WANTED).total()
        figures.add(
            experiment=experiment,
            store=self.store_name,
            images=WANTED.total(),
            kills=kills,
            lost=found.lost,
            doubled=found.doubled,
            redone=redone,
        )
        assert (found.lost, found.doubled, found.failed) == (0, 0, {})
        assert redone <= may_redo
        assert_verified(self.config)


# `make test` uses the disk and one of the servers, `make chaos` also the other.
LONG_ON_S3 = [pytest.mark.s3, pytest.mark.long]
ON_STORES = {
    "moto": ["disk", pytest.param("moto", marks=pytest.mark.s3), pytest.param("rclone", marks=LONG_ON_S3)],
    "rclone": ["disk", pytest.param("moto", marks=LONG_ON_S3), pytest.param("rclone", marks=pytest.mark.s3)],
}


@pytest.fixture
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    """A scene; buckets are behind a proxy that forwards only whole requests.

    Without it, no other driver could continue: while the sender of half an upload is paused, rclone answers no listing
    of the folder, and sometimes answers other uploads with 500 (InternalError).
    """
    if request.param == "disk":
        yield Scene("disk", tmp_path, None)
        return
    server: S3Server = request.getfixturevalue(request.param)
    with counting_proxy(server.endpoint_url) as proxy:
        yield Scene(server.name, tmp_path, replace(server, endpoint_url=proxy.endpoint_url))


@pytest.mark.parametrize("scene", ON_STORES["rclone"], indirect=True)
def test_of_drivers_started_at_once_one_runs_and_the_other_names_it(scene: Scene, figures: Figures) -> None:
    with held(scene.model):  # until one driver has met the other
        # A lease that is long enough for a busy machine; its first heartbeats come quickly.
        drivers = [scene.start("--set=failures.lease_ttl_s=60"), scene.start("--set=failures.lease_ttl_s=60")]
        first_to_end(drivers)
    ends = {driver.pid: driver.end() for driver in drivers}
    assert sorted(code for code, _ in ends.values()) == [0, 75], ends
    (winner,) = (pid for pid, (code, _) in ends.items() if code == 0)
    (said,) = (said for code, said in ends.values() if code == 75)
    assert re.search(rf"{re.escape(scene.output)}: \S+:{winner} is at work on this run, since", said), said
    scene.judge(figures, "two drivers at once")


@pytest.mark.parametrize("scene", ON_STORES["moto"], indirect=True)
def test_a_driver_paused_past_its_lease_wakes_and_writes_nothing(scene: Scene, figures: Figures) -> None:
    with held(scene.model, after=12):
        paused = scene.start()
        scene.wait_for_commits(2)
        paused.send(signal.SIGSTOP)
    assert scene.num_commits() < NUM_SHARDS
    follower = scene.start()
    code, said = follower.end()
    assert code == 0, said
    assert f":{paused.pid} gave no sign of life for {TTL_S} s; taking the run over" in said
    after = scene.everything()
    paused.send(signal.SIGCONT)
    code, said = paused.end()
    assert code == 75, said
    assert f":{follower.pid} has taken this run over" in said
    assert scene.everything() == after
    # The batch in work and the one on its way at the pause, and the one that it finishes when it wakes.
    scene.judge(figures, "driver paused past its lease", kills=1, may_redo=3 * BATCH)
