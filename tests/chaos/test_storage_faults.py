"""Runs whose storage fails at every tenth request, or is unavailable for a while, finish with the right bytes."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos.driver import PacedDriver
from chaos.figures import Figures
from chaos.outputs import assert_verified, contents, read_back, store_of
from chaos.paced_pipeline import forget, held, made, make_paced_pipeline, model_folder
from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.job import run
from flux_batch.output import lease
from helpers.counting_proxy import Proxy, counting_proxy
from helpers.job_files import make_job, write_job
from helpers.s3 import S3Server
from helpers.waiting import PATIENCE_S, wait_until

RATE = 0.1
BATCH = 2
# Faults of any request; half an answer is only possible for GET, half a write only for PUT.
ANYTHING = (500, 503, "cut", "lost", "slow")
OF_METHOD = {"GET": ("half",), "PUT": ("torn",)}
# A server that honours conditions may answer a conditional write, such as these, with 409 (another write is under way)
# or, after a lost answer, with 412 (the object exists). The writer must notice if it does not exist.
OF_CONDITIONS = (409, 412)
CONDITIONAL = re.compile(r"/(train|metadata)/|/_run/(commits|lease)/|/_run/plan")
SLOW_S = 0.3


class Faults:
    """Draws a fault for each request, in the order of requests; `counts` the faults by kind."""

    def __init__(self, seed: int, *, conditions: bool) -> None:
        self.counts: Counter[int | str] = Counter()
        self._conditions = conditions
        self._dice = random.Random(seed)
        self._lock = threading.Lock()

    def __call__(self, method: str, path: str) -> int | str | None:
        with self._lock:
            if self._dice.random() >= RATE:
                return None
            kinds = ANYTHING + OF_METHOD.get(method, ())
            if self._conditions and method == "PUT" and CONDITIONAL.search(path):
                kinds += OF_CONDITIONS
            fault = self._dice.choice(kinds)
            self.counts[fault] += 1
            return fault


class Scene:
    """A server, a proxy in front of it, and a job that only knows the proxy."""

    def __init__(self, server: S3Server, proxy: Proxy, folder: Path) -> None:
        self.server = server
        self.proxy = proxy
        self.folder = folder
        self.model = model_folder(folder / "model", 0.02)
        self._bucket = server.make_bucket()

    def rows(self, count: int) -> list[dict[str, Any]]:
        return [{"prompt": f"image {number}"} for number in range(count)]

    def job(self, name: str, count: int, options: dict[str, Any], **failures: float) -> JobConfig:
        return make_job(
            self.folder,
            self.rows(count),
            output={"uri": f"{self._bucket}/{name}", "storage_options": options, "shard_size": 4},
            model={"uri": str(self.model)},
            workers={"batch_size": BATCH},
            failures=failures,
        )

    def start(self, name: str, count: int, engine: str, **failures: float) -> PacedDriver:
        options = self.server.storage_options
        job = self.job(name, count, {"endpoint_url": self.proxy.endpoint_url}, **failures)
        keys = {"AWS_ACCESS_KEY_ID": options["key"], "AWS_SECRET_ACCESS_KEY": options["secret"]}
        return PacedDriver(write_job(job, self.folder / f"{name}.yaml"), engine=engine, **keys)

    def judge(self, figures: Figures, experiment: str, name: str, count: int, num_faults: int) -> None:
        """Compare the output of a run with the prompts, and with a run without the proxy."""
        config = self.job(name, count, self.server.storage_options)
        wanted = Counter(row["prompt"] for row in self.rows(count))
        found = read_back(config, wanted, self.folder / "scratch")
        redone = (made(self.model) - wanted).total()
        figures.add(
            experiment=experiment,
            store=self.server.name,
            images=count,
            faults=num_faults,
            lost=found.lost,
            doubled=found.doubled,
            redone=redone,
        )
        assert (found.lost, found.doubled, found.failed) == (0, 0, {})
        assert_verified(config)
        forget(self.model)
        whole = self.job(f"{name}-undisturbed", count, self.server.storage_options)
        run(whole, engine=LocalEngine(), make_pipeline=make_paced_pipeline)
        assert everything_but_the_job(config) == everything_but_the_job(whole)
        forget(self.model)


@pytest.fixture(params=["moto", "rclone"])
def scene(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)  # for the undisturbed run, which has no other driver
    server: S3Server = request.getfixturevalue(request.param)
    with counting_proxy(server.endpoint_url) as proxy:
        yield Scene(server, proxy, tmp_path)


def end(driver: PacedDriver, timeout_s: float) -> None:
    """Wait for a driver to finish its run."""
    try:
        code, said = driver.end(timeout_s)
    except subprocess.TimeoutExpired:
        driver.process.kill()
        raise
    assert code == 0, said


def err(scene: Scene, figures: Figures, seed: int, count: int, engine: str = "local", *, timeout_s: float) -> None:
    faults = Faults(seed, conditions=scene.server.name == "moto")
    scene.proxy.fault, scene.proxy.slow_s = faults, SLOW_S
    before, name = len(scene.proxy.requests), f"faults-{seed}"
    end(scene.start(name, count, engine), timeout_s)
    scene.proxy.fault = lambda method, path: None
    num_requests = len(scene.proxy.requests) - before
    assert faults.counts.total() > 0.5 * RATE * num_requests
    scene.judge(figures, "storage that errs at 10 %", name, count, faults.counts.total())


def leave(scene: Scene, figures: Figures, away_s: float, count: int, *, timeout_s: float) -> None:
    """Make the storage unavailable in the middle of a run, and then available again."""
    with held(scene.model, after=count // 2):
        driver = scene.start("away", count, "local")
        store = store_of(scene.job("away", count, scene.server.storage_options))
        wait_until(lambda: len(store.list("_run/commits")) >= 2, timeout_s=timeout_s)
        scene.proxy.is_down = True
        before = len(scene.proxy.requests)
    time.sleep(away_s)
    wait_until(lambda: len(scene.proxy.requests) > before)
    refused = len(scene.proxy.requests) - before
    assert driver.process.poll() is None
    scene.proxy.is_down = False
    end(driver, timeout_s)
    scene.judge(figures, f"storage that is away for {away_s:g} s", "away", count, refused)


def stop(scene: Scene, figures: Figures, fault: str, count: int, engine: str) -> None:
    """Stop a run that waits for unavailable storage, and resume it when the storage is back."""
    with held(scene.model, after=count // 2):
        driver = scene.start("stopped", count, engine, drain_s=5)
        store = store_of(scene.job("stopped", count, scene.server.storage_options))
        wait_until(lambda: len(store.list("_run/commits")) >= 2)
        scene.proxy.fault = lambda method, path: fault
        before = len(scene.proxy.requests)
    wait_until(lambda: len(scene.proxy.requests) > before)
    driver.send(signal.SIGTERM)
    code, said = driver.end()
    assert (code, "stopped by SIGTERM" in said) == (75, True), said
    refused = len(scene.proxy.requests) - before
    scene.proxy.fault = lambda method, path: None
    end(scene.start("stopped", count, engine), PATIENCE_S)
    experiment = f"stopped while storage is {'away' if fault == 'cut' else 'silent'}"
    scene.judge(figures, experiment, "stopped", count, refused)


def everything_but_the_job(config: JobConfig) -> dict[str, Any]:
    """Read a run's objects; its job file names the address of the proxy."""
    return {key: value for key, value in contents(config).items() if key != "_run/job.yaml"}


@pytest.mark.s3
def test_a_run_finishes_on_storage_that_errs(scene: Scene, figures: Figures) -> None:
    err(scene, figures, 7, 8, timeout_s=PATIENCE_S)


@pytest.mark.s3
@pytest.mark.parametrize("scene", ["moto"], indirect=True)
def test_a_run_waits_for_storage_that_is_away(scene: Scene, figures: Figures) -> None:
    leave(scene, figures, 3, 20, timeout_s=PATIENCE_S)


@pytest.mark.s3
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(1, 6))
def test_runs_of_many_seeds_finish_on_storage_that_errs(scene: Scene, figures: Figures, seed: int) -> None:
    err(scene, figures, seed, 60, timeout_s=500)


@pytest.mark.s3
@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_run_on_a_cluster_finishes_on_storage_that_errs(scene: Scene, figures: Figures) -> None:
    err(scene, figures, 11, 100, "ray", timeout_s=900)


@pytest.mark.s3
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_run_waits_a_minute_for_storage_that_is_away(scene: Scene, figures: Figures) -> None:
    leave(scene, figures, 60, 200, timeout_s=300)


@pytest.mark.s3
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scene", ["moto"], indirect=True)
@pytest.mark.parametrize("fault", ["cut", "hold"])
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_stop_ends_a_run_whose_storage_is_away(scene: Scene, figures: Figures, fault: str, engine: str) -> None:
    stop(scene, figures, fault, 40, engine)
