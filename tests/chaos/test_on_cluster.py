"""Runs on a cluster of several raylets: repeated kills of driver, workers and nodes, and harmful rows."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from chaos.figures import Figures
from chaos.outputs import assert_verified, contents, kept, read_back
from chaos.paced_pipeline import forget, hold, let_go, made, made_by, make_paced_pipeline, model_folder
from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.engine.ray_actor import WorkerActor
from flux_batch.job import run
from helpers.job_files import make_job, write_job
from helpers.raylets import Raylets, kill_worker, raylets
from helpers.waiting import PATIENCE_S

pytestmark = [pytest.mark.ray, pytest.mark.nodes]

DRIVE = Path(__file__).with_name("drive.py")
BATCH = 4
# A lost worker loses the batch in work, and the one on its way to the store.
MAX_LOST = 2 * BATCH
# In this many kills, two may hit an image that is made alone.
KILLS_A_HIT = 50
# The seconds per image, so that some kills hit within a batch and some between batches.
PACE_S = 0.1
LOOK_S = 0.05

# Harmful rows, in batches of four; the first two are in the same batch, the others among good ones.
BAD = {5: " [die]", 6: " [raise]", 13: " [oom]", 18: " [hang]"}
HARMFUL_ROWS = [{"prompt": f"image {number}{BAD.get(number, '')}"} for number in range(24)]
HANG_S = 3
# The row that ends its process loses three workers: in its batch, and twice alone. So does the row that hangs.
LOST_WORKERS = 6


@dataclass(frozen=True)
class Size:
    """The size of an experiment."""

    nodes: int
    num_images: int
    shard_size: int
    workers: int  # to kill
    drivers: int
    raylets: int
    seed: int

    @property
    def num_kills(self) -> int:
        return self.workers + self.drivers + self.raylets


SHORT = Size(nodes=2, num_images=32, shard_size=8, workers=2, drivers=1, raylets=1, seed=1)
LONG = Size(nodes=3, num_images=600, shard_size=20, workers=120, drivers=40, raylets=40, seed=2026)


@dataclass(frozen=True)
class Kill:
    """The victim of a kill, and the state of the run right before it."""

    victim: str
    kept: set[str]  # prompts whose images were staged or committed
    workers: set[int]  # processes
    num_made: int


class Driver:
    """The driver, started again with the same command whenever it ends before the run."""

    def __init__(self, job: Path, address: str, said: Path) -> None:
        self._job = job
        self._environment = {**os.environ, "RAY_ADDRESS": address}
        self._said = said
        self.num_starts = 0
        self.codes: Counter[int] = Counter()
        self.start()

    def start(self) -> None:
        self.num_starts += 1
        with self._said.open("ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, str(DRIVE), str(self._job)],
                env=self._environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def kill(self) -> bool:
        """Kill the driver. Returns: whether it was still running."""
        self._process.send_signal(signal.SIGKILL)
        return self._process.wait() == -signal.SIGKILL

    def is_done(self) -> bool:
        """Return whether the driver has finished the run; start a driver that ended otherwise again."""
        code = self._process.poll()
        if code is None:
            return False
        self.codes[code] += 1
        if code != 0:
            assert code in (75, -signal.SIGKILL), f"exit code {code}: {self.said()}"
            self.start()
        return code == 0

    def said(self) -> str:
        """Return the driver's output, without the lines that Ray forwards from other processes."""
        lines = self._said.read_text().splitlines()
        return "\n".join(line for line in lines if "(raylet)" not in line and f"({WorkerActor.__name__}" not in line)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with raylets(SHORT.nodes) as cluster:
        yield cluster


def plan_kills(size: Size) -> list[tuple[int, str, float]]:
    """Draw the kills. Returns: for each, the number of images, the victim, and a delay in seconds."""
    dice = random.Random(size.seed)
    victims = ["worker"] * size.workers + ["driver"] * size.drivers + ["raylet"] * size.raylets
    dice.shuffle(victims)
    moments = sorted(dice.randrange(round(0.95 * size.num_images)) for _ in victims)
    return [(moment, victim, dice.uniform(0, BATCH * PACE_S)) for moment, victim in zip(moments, victims, strict=True)]


def kill_one(victim: str, driver: Driver, cluster: Raylets, dice: random.Random) -> bool:
    """Kill a driver, worker or raylet. Returns: whether there was one."""
    if victim == "driver":
        was_there = driver.kill()
        driver.start()
        return was_there
    if victim == "raylet":
        cluster.lose(dice.randrange(cluster.num_nodes))
        cluster.add()
        return True
    workers = cluster.workers()
    return bool(workers) and kill_worker(dice.choice(workers))


def run_with_kills(size: Size, config: JobConfig, cluster: Raylets, folder: Path) -> tuple[list[Kill], Driver]:
    """Run a job to its end with kills. Returns: the kills, and the last driver."""
    dice = random.Random(size.seed)
    model = Path(config.model.uri)
    kills: list[Kill] = []
    plan = plan_kills(size)

    def wait_for_next() -> None:
        """Run until a batch after the next kill, or to the end after the last kill."""
        if plan:
            hold(model, min(plan[0][0] + BATCH, size.num_images - 1))
        else:
            let_go(model)

    wait_for_next()
    driver = Driver(write_job(config, folder / "job.yaml"), cluster.address, folder / "said.txt")
    while not driver.is_done():
        time.sleep(LOOK_S)
        if plan and len(made(model)) >= plan[0][0]:
            _, victim, pause_s = plan[0]
            time.sleep(pause_s)
            hold(model)  # killing a node takes longer than making many images
            kill = Kill(victim, kept(config), set(cluster.workers()), made(model).total())
            if kill_one(victim, driver, cluster, dice):  # else there is no victim now: try again later
                kills.append(kill)
                plan.pop(0)
            wait_for_next()
    assert not plan, f"the run was done before {len(plan)} of the kills"
    return kills, driver


def made_in_vain(kills: list[Kill], images: list[tuple[int, str]]) -> list[str]:
    """List images that were staged or committed before a kill, but made again by a later worker."""
    known: set[int] = set()
    in_vain = []
    for kill in kills:
        known |= kill.workers
        in_vain += [prompt for pid, prompt in images[kill.num_made :] if pid not in known and prompt in kill.kept]
    return in_vain


def judge(size: Size, tmp_path: Path, cluster: Raylets, figures: Figures) -> None:
    model = model_folder(tmp_path / "model", PACE_S)
    rows = [{"prompt": f"image {number}"} for number in range(size.num_images)]
    wanted = Counter(row["prompt"] for row in rows)

    def job(name: str) -> JobConfig:
        return make_job(
            tmp_path,
            rows,
            output={"uri": str(tmp_path / name), "shard_size": size.shard_size},
            model={"uri": str(model)},
            workers={"max": size.nodes, "batch_size": BATCH},
        )

    config = job("killed")
    kills, driver = run_with_kills(size, config, cluster, tmp_path)
    made_in_all = made(model)
    assert made_in_vain(kills, made_by(model)) == []
    found = read_back(config, wanted, tmp_path / "scratch")
    # If two kills hit an image that is made alone, the run takes it for an image that kills its worker.
    assert {kind for kind, _ in found.failed.values()} <= {"WorkerLost"}, found.failed
    assert len(found.failed) <= size.num_kills // KILLS_A_HIT, found.failed
    if found.failed:
        run(config, engine=LocalEngine(), make_pipeline=make_paced_pipeline, retry_failed=True)
        found = read_back(config, wanted, tmp_path / "scratch")
    redone = (made_in_all - wanted).total()
    figures.add(
        experiment="random kills on a cluster",
        store="disk",
        images=size.num_images,
        kills=len(kills),
        lost=found.lost,
        doubled=found.doubled,
        redone=redone,
    )
    assert len(kills) == size.num_kills
    assert (found.lost, found.doubled, found.failed) == (0, 0, {})
    # When a driver is killed, its workers end too.
    num_workers_lost = size.workers + size.raylets + size.nodes * size.drivers
    assert made_in_all.total() <= size.num_images + num_workers_lost * MAX_LOST
    assert "Traceback" not in driver.said()
    assert_verified(config)

    whole = job("whole")
    model_folder(model, 0)
    forget(model)
    run(whole, engine=LocalEngine(), make_pipeline=make_paced_pipeline)
    assert contents(config) == contents(whole)


@pytest.mark.timeout(600)
def test_a_run_survives_random_kills(tmp_path: Path, cluster: Raylets, figures: Figures) -> None:
    judge(SHORT, tmp_path, cluster, figures)


def test_each_bad_row_costs_itself_alone_and_says_why(tmp_path: Path, cluster: Raylets, figures: Figures) -> None:
    """All bad rows are in one job: the good rows are made, and each bad row records its own reason."""
    model = model_folder(tmp_path / "model", 0.02)
    config = make_job(
        tmp_path,
        HARMFUL_ROWS,
        output={"shard_size": 8},
        model={"uri": str(model)},
        workers={"batch_size": BATCH},
        failures={"hang_s": HANG_S, "max_ratio": 1.0},
    )
    ended = subprocess.run(
        [sys.executable, str(DRIVE), str(write_job(config, tmp_path / "job.yaml"))],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        start_new_session=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    good = Counter(row["prompt"] for number, row in enumerate(HARMFUL_ROWS) if BAD.get(number) in (None, " [oom]"))
    found = read_back(config, good, tmp_path / "scratch")
    redone = (made(model) - good).total()
    figures.add(
        experiment="rows that do harm",
        store="disk",
        images=len(HARMFUL_ROWS),
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
    # Only the images of a batch that loses its worker may be made again.
    assert redone <= LOST_WORKERS * BATCH
    assert_verified(config)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_run_survives_two_hundred_random_kills(tmp_path: Path, figures: Figures) -> None:
    with raylets(LONG.nodes) as cluster:
        judge(LONG, tmp_path, cluster, figures)
