"""A driver killed at every step of the commit protocol: the same command ends in the output of an undisturbed run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chaos.figures import Figures
from chaos.mortal_driver import PHASES, Nursery, Point
from chaos.outputs import assert_verified, contents, read_back
from chaos.paced_pipeline import forget, made, model_folder
from flux_batch.config.schema import JobConfig
from helpers.job_files import make_job, write_job
from helpers.s3 import S3Server

EXPERIMENT = "driver killed at a write"
BATCH = 2
# Three shards with five, three and one good rows. The first stages two objects, the second has two kinds of failed
# rows.
ROWS: list[dict[str, Any]] = [{"prompt": f"image {number}"} for number in range(11)]
ROWS[6] = {"prompt": "image 6 [raise]"}
ROWS[7] = {"prompt": None}
WANTED = Counter(row["prompt"] for number, row in enumerate(ROWS) if number not in (6, 7))
LAYOUTS = ["webdataset", "files", "parquet"]
PACE_S = 0.01

# Each kind of write, in the order of one run whose drivers are killed at one point after the other. The number counts
# the writes of that kind by one driver, from 0.
ON_DISK = [
    Point("lease", 0, "within"),
    Point("job", 0, "before"),
    Point("card", 0, "within"),
    Point("plan", 0, "after"),
    Point("precision", 0, "within"),
    Point("staging", 0, "within"),
    Point("staging", 1, "after"),
    Point("data", 0, "within"),
    Point("clean-up", 1, "before"),
    Point("metadata", 0, "after"),
    Point("failed rows", 0, "after"),
    Point("data", 1, "after"),
    Point("commit", 0, "within"),
    Point("log of commits", 0, "after"),
    Point("progress", 0, "before"),
    Point("report", 0, "before"),
    Point("success", 0, "within"),
    Point("release", 0, "within"),
]
# Points at which buckets differ from a disk, each on one of the servers.
IN_BUCKETS = {
    "moto": [Point("probe", 0, "after"), Point("commit", 1, "after")],
    "rclone": [Point("data", 1, "before")],
}


class Places:
    """A store for outputs, with jobs that differ only in their output."""

    def __init__(self, name: str, folder: Path, server: S3Server | None) -> None:
        self.name = name
        self.folder = folder
        self.model = model_folder(folder / "model", PACE_S)
        self._options = server.storage_options if server else {}
        self._root = server.make_bucket() if server else str(folder / "outputs")

    @property
    def environment(self) -> dict[str, str]:
        """The credentials of the store, which no job file may hold."""
        if not self._options:
            return {}
        return {"AWS_ACCESS_KEY_ID": self._options["key"], "AWS_SECRET_ACCESS_KEY": self._options["secret"]}

    def job(self, name: str, layout: str) -> tuple[JobConfig, Path]:
        """Write a job with its own output. Returns: its config, with credentials, and its file."""
        sections: dict[str, Any] = {
            "model": {"uri": str(self.model)},
            "workers": {"batch_size": BATCH},
            "failures": {"max_ratio": 1.0},
        }
        output = {"uri": f"{self._root}/{name}", "format": layout, "shard_size": 5}
        config = make_job(self.folder, ROWS, output={**output, "storage_options": self._options}, **sections)
        public = {key: value for key, value in self._options.items() if key == "endpoint_url"}
        job = make_job(self.folder, ROWS, output={**output, "storage_options": public}, **sections)
        return config, write_job(job, self.folder / f"{name}.yaml")


class Experiment:
    """Kills drivers of one layout on one store, and compares the output with that of an undisturbed run."""

    def __init__(self, places: Places, layout: str, nursery: Nursery, figures: Figures) -> None:
        self._places = places
        self._layout = layout
        self._nursery = nursery
        self._figures = figures
        self.whole, job = places.job(f"whole-{layout}", layout)
        forget(places.model)
        assert self._drive(job).code == 0
        assert made(places.model) == WANTED
        self.points = nursery.points()
        self._expected = contents(self.whole)

    def kill_at(self, *points: Point) -> None:
        """Kill the drivers of a run one after the other, each at a point; then finish the run and check its output."""
        places, name = self._places, f"{self._layout}-{points[0]}".replace(" ", "-")
        config, job = places.job(name, self._layout)
        forget(places.model)
        redone = 0
        for point in (*points, None):
            end = self._drive(job, point)
            assert end.is_killed if point else end.code == 0, f"{point}: {end}"
            assert "checking whether it is alive" not in end.said, point
            before, redone = redone, (made(places.model) - WANTED).total()
            assert redone - before <= BATCH, point
        found = read_back(config, WANTED, places.folder / "scratch")
        self._figures.add(
            experiment=EXPERIMENT,
            store=places.name,
            images=WANTED.total(),
            kills=len(points),
            lost=found.lost,
            doubled=found.doubled,
            redone=redone,
        )
        assert (found.lost, found.doubled) == (0, 0), points
        _assert_same(contents(config), self._expected, points)
        assert_verified(config)

    def _drive(self, job: Path, point: Point | None = None) -> Any:
        end = self._nursery.drive(job, point, environment=self._places.environment)
        assert "Traceback" not in end.said, end.said
        return end


def _assert_same(left: dict[str, Any], right: dict[str, Any], points: Sequence[Point]) -> None:
    assert left.keys() == right.keys(), points  # nothing extra, nothing missing
    assert [key for key in left if left[key] != right[key]] == [], points


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Nursery:
    return Nursery(tmp_path_factory.mktemp("nursery"))


@pytest.fixture(
    params=["disk", pytest.param("moto", marks=pytest.mark.s3), pytest.param("rclone", marks=pytest.mark.s3)]
)
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Places:
    server = None if request.param == "disk" else request.getfixturevalue(request.param)
    return Places(request.param, tmp_path, server)


def test_a_driver_killed_at_each_kind_of_write_goes_on(places: Places, nursery: Nursery, figures: Figures) -> None:
    experiment = Experiment(places, "webdataset", nursery, figures)
    points = ON_DISK if places.name == "disk" else IN_BUCKETS[places.name]
    if places.name == "disk":  # a new kind of write must be added to this list
        assert {point.name for point in points} | {"heartbeat"} >= {name for name, _ in experiment.points}
    experiment.kill_at(*points)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_driver_killed_at_every_write_goes_on(
    places: Places, nursery: Nursery, figures: Figures, layout: str
) -> None:
    if places.name != "disk" and layout != "webdataset":
        pytest.skip("what is written in which order differs by layout, and not by store")
    experiment = Experiment(places, layout, nursery, figures)
    phases = PHASES if places.name == "disk" else ("before", "after")
    for name, number in experiment.points:
        for phase in phases:
            # Heartbeats come at no fixed point, and a removal publishes nothing.
            if name != "heartbeat" and not (phase == "within" and ("removal" in name or name == "clean-up")):
                experiment.kill_at(Point(name, number, phase))
