"""Annotations on a cluster: repeated kills of the driver and its workers, and harmful annotators."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from chaos.figures import Figures
from flux_batch.config.schema import JobConfig
from flux_batch.dataset.annotate import AnnotateSettings, annotate
from flux_batch.dataset.annotators.load import parse_specs
from flux_batch.engine.local import LocalEngine
from helpers.finished_runs import finish
from helpers.job_files import make_job
from helpers.raylets import Raylets, kill_worker, raylets
from helpers.waiting import PATIENCE_S

pytestmark = [pytest.mark.ray, pytest.mark.long]

NODES = 2
LOOK_S = 0.05
# Three annotators at once; two of them are slow, so that kills also hit in the middle of a batch.
ANNOTATORS = ("slow=helpers.annotators:Paced", "prompts=helpers.annotators:Paced", "phash")
PACE_S = 0.02
# The annotator gets one bad image of each kind among good ones, in batches of four.
BAD = {5: "[sour]", 6: "[lie]", 13: "[kill]", 18: "[freeze]", 21: "[eat]"}
HARMFUL_ROWS = [{"prompt": f"image {number} {BAD.get(number, '')}"} for number in range(24)]
HANG_S = 3


@dataclass(frozen=True)
class Size:
    """The size of an experiment."""

    num_images: int
    shard_size: int
    num_kills: int
    seed: int


SIZE = Size(num_images=2000, shard_size=20, num_kills=50, seed=2026)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with raylets(NODES) as cluster:
        yield cluster


def command(config: JobConfig, *texts: str) -> list[str]:
    """Return the command line that annotates the run on the nodes of the cluster."""
    annotators = [word for text in texts for word in ("--with", text)]
    workers = ["--workers", str(NODES), "--num-gpus", "1", "--num-cpus", "0", "--batch-size", "4"]
    return [sys.executable, "-m", "flux_batch", "annotate", config.output.uri, *annotators, *workers]


def files(config: JobConfig) -> dict[str, bytes]:
    folder = Path(config.output.uri, "annotations")
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def num_committed(config: JobConfig) -> int:
    return len(list(Path(config.output.uri, "_run/annotations").glob("*/commits/*.json")))


def kill_one(driver: subprocess.Popen[Any], cluster: Raylets, dice: random.Random) -> str:
    """Kill the driver or one of its workers. Returns: its kind, empty if it was already gone."""
    if dice.random() < 0.5:
        driver.send_signal(signal.SIGKILL)
        return "driver" if driver.wait() == -signal.SIGKILL else ""
    workers = cluster.workers()
    return "worker" if workers and kill_worker(dice.choice(workers)) else ""


def judge(size: Size, tmp_path: Path, cluster: Raylets, figures: Figures) -> None:
    rows = [{"prompt": f"image {number}" + " [sour]" * (number % 97 == 5)} for number in range(size.num_images)]
    failures = {"max_ratio": 1.0, "max_attempts": size.num_kills + 1}
    config = make_job(tmp_path, rows, output={"shard_size": size.shard_size}, failures=failures)
    finish(config)
    settings = AnnotateSettings(batch_size=4)
    annotate(config.output.uri, parse_specs(ANNOTATORS, {}), engine=LocalEngine(), settings=settings)
    whole = files(config)
    for name in whole:
        Path(config.output.uri, "annotations", name).unlink()
    for path in sorted(Path(config.output.uri, "_run/annotations").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()

    dice = random.Random(size.seed)
    in_all = len(ANNOTATORS) * size.num_images // size.shard_size
    moments = sorted(dice.randrange(round(0.9 * in_all)) for _ in range(size.num_kills))
    words = [*command(config, *ANNOTATORS), "--set", f"slow.pace_s={PACE_S}", "--set", f"prompts.pace_s={PACE_S}"]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    kills, driver = [], None
    with (tmp_path / "said.txt").open("ab") as said:
        while driver is None or driver.poll() != 0:
            if driver is None or driver.poll() is not None:
                assert driver is None or driver.returncode in (75, -signal.SIGKILL), (tmp_path / "said.txt").read_text()
                driver = subprocess.Popen(words, env=environment, stdout=said, stderr=said, start_new_session=True)
            time.sleep(LOOK_S)
            if moments and num_committed(config) >= moments[0]:
                time.sleep(dice.uniform(0, size.shard_size * PACE_S))
                if victim := kill_one(driver, cluster, dice):
                    kills.append(victim)
                    moments.pop(0)
    assert not moments, f"the pass was done before {len(moments)} of the kills"

    figures.add(experiment="annotations with kills", store="disk", images=size.num_images, kills=len(kills))
    assert files(config) == whole
    assert "Traceback" not in (tmp_path / "said.txt").read_text()


@pytest.mark.timeout(3000)
def test_a_pass_over_two_thousand_images_survives_fifty_kills(
    tmp_path: Path, cluster: Raylets, figures: Figures
) -> None:
    judge(SIZE, tmp_path, cluster, figures)


@pytest.mark.timeout(600)
def test_an_annotator_that_does_harm_costs_the_images_it_is_about(tmp_path: Path, cluster: Raylets) -> None:
    """It raises, returns wrong types, ends its process, hangs and uses up memory; the other has all rows."""
    failures = {"max_ratio": 1.0, "hang_s": HANG_S}
    config = make_job(tmp_path, HARMFUL_ROWS, output={"shard_size": 8}, failures=failures)
    finish(config)
    ended = subprocess.run(
        command(config, "harm=helpers.annotators:Harm", "phash"),
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        start_new_session=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    tables = {name: pq.read_table(Path(config.output.uri, "annotations", name)) for name in ("harm", "phash")}
    assert set(tables["phash"]["error_type"].to_pylist()) == {None}
    found = tables["harm"].to_pylist()
    assert {number: row["error_type"] for number, row in enumerate(found) if row["error_type"]} == {
        5: "RuntimeError",
        6: "TypeError",
        13: "WorkerLost",
        18: "WorkerLost",
        21: "MemoryError",
    }
    assert "its worker died" in found[13]["error_message"]
    assert "no progress for" in found[18]["error_message"]
