import importlib.util
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flux_batch.bench import job
from flux_batch.bench.job import bench_job, format_job, job_config, rate, ray_data, run_in_process
from flux_batch.bench.job_task import JobSize, Task
from flux_batch.bench.source import Source
from flux_batch.errors import JobError

TINY = Source(random_weights="tiny", device="cpu", dtype="float32")
SIZE = JobSize(images=6, width=32, height=32, steps=1, t5_sequence_length=64, batch_size=2, shard_size=2)


def test_a_job_in_this_process_is_compared_with_a_bare_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    # The long tests below run each contender in its own process.
    monkeypatch.setattr(job, "run_in_process", lambda contender, task: {**contender(task), "wall_s": 1.0})
    monkeypatch.setattr(job, "prepare_process", lambda pipeline: None)  # this process is not only for the benchmark
    figures = bench_job(TINY, SIZE, engine="local")

    rates = figures["images_per_second"]
    assert rates.keys() == {"bare loops", "job"}
    assert figures["job_times_as_fast_as"]["bare loops"] == pytest.approx(
        rates["job"]["median"] / rates["bare loops"]["median"]
    )
    assert figures["size"]["workers"] == 1
    for share in figures["device_busy_share"].values():
        assert 0 < share["median"] <= 1
    assert "times the images a second of bare loops" in format_job(figures)


def test_a_rate_counts_the_time_from_each_workers_start(tmp_path: Path) -> None:
    (tmp_path / "ready-a").write_text("100.0")
    (tmp_path / "ready-b").write_text("102.0")
    task = Task(source=TINY, size=JobSize(images=30), engine="ray", folder=tmp_path)

    assert rate(task, 106.0, 8.0) == {"images_per_second": 6.0, "workers": 2, "device_busy_share": 0.8}


@pytest.mark.parametrize(
    ("size", "shard_size"),
    [
        (JobSize(images=400, workers=2), 20),
        (JobSize(images=64, workers=2), 4),
        (JobSize(images=20, workers=1, batch_size=1), 2),
        (JobSize(images=8, workers=8), 4),
        (JobSize(images=400, workers=2, shard_size=16), 16),
    ],
)
def test_a_worker_gets_ten_shards_of_whole_batches_unless_told_otherwise(size: JobSize, shard_size: int) -> None:
    assert size.here("ray", "cpu").shard_size == shard_size


def test_all_contenders_get_the_same_prompts_and_seeds(tmp_path: Path) -> None:
    config = job_config(Task(source=TINY, size=SIZE.here("local"), engine="local", folder=tmp_path))

    assert pq.read_table(config.prompts.uri[0]).to_pylist() == SIZE.rows()
    assert len({row["prompt"] for row in SIZE.rows()}) == 6


@pytest.mark.parametrize("missing", ["ray", "diffusers"])
def test_a_missing_package_is_named_before_anything_runs(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())

    with pytest.raises(JobError, match=f"{missing} is not installed"):
        bench_job(TINY, SIZE, engine="local", against=["ray-data"])


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_job_on_ray_is_compared_with_ray_data() -> None:
    figures = bench_job(TINY, replace(SIZE, workers=2), against=["ray-data"])

    assert figures["images_per_second"].keys() == {"bare loops", "job", "Ray Data"}
    assert figures["job_times_as_fast_as"]["Ray Data"] > 0


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(600)
def test_ray_data_makes_every_image_once(tmp_path: Path) -> None:
    run_in_process(ray_data, Task(source=TINY, size=SIZE.here("ray"), engine="ray", folder=tmp_path))

    members = []
    for path in (tmp_path / "tars").rglob("*.tar"):
        with tarfile.open(path) as tar:
            members += tar.getnames()
    assert sorted(members) == sorted(f"{seed:09}.{kind}" for seed in range(6) for kind in ("png", "txt"))
