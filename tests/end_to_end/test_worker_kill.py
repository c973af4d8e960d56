"""A worker killed at any write of a shard: the next worker ends in the same bytes, and makes few images again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import flux_batch.worker.worker
from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.job import run
from flux_batch.output.commits import Commits
from flux_batch.output.paths import JOB, PLAN, RunFolder
from flux_batch.records import Attempt
from flux_batch.storage.store import Store
from helpers.fakes import make_fake_pipeline
from helpers.job_files import data_files, make_job, metadata
from helpers.mortal import Death, Life, open_worker, staged

BATCH = 2
ROWS = [{"prompt": f"image {number}"} for number in range(7)] + [{"prompt": "bad [raise]"}, {"prompt": None}]
MAKEABLE = 7


def job(folder: Path, layout: str, rows: list[dict[str, Any]] = ROWS) -> JobConfig:
    return make_job(folder, rows, output={"format": layout, "shard_size": 9}, workers={"batch_size": BATCH})


@pytest.mark.parametrize("layout", ["webdataset", "files", "parquet"])
def test_a_kill_at_any_write_costs_at_most_a_batch_and_no_byte(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = job(tmp_path / "whole", layout)
    life = Life()
    worker, _, plan = open_worker(whole, monkeypatch, life)
    worker.make(plan.shards[0]).finish()
    num_writes = len(life.writes)
    assert num_writes >= 3 + 3 + 3  # staged, published, removed

    for last in range(num_writes):
        config = job(tmp_path / str(last), layout)
        made: Counter[str] = Counter()
        first, pipeline, plan = open_worker(config, monkeypatch, Life(last))
        with pytest.raises(Death):
            first.make(plan.shards[0]).finish()
        made.update(pipeline.made)
        is_done = Commits(RunFolder(Store(config.output.uri), 1)).done() == {0}

        second, pipeline, plan = open_worker(config, monkeypatch)
        result = second.make(plan.shards[0], Attempt(number=2, lost=1)).finish()
        made.update(pipeline.made)

        assert result.is_new is not is_done
        assert (result.num_images, result.num_failed) == (9, 2)
        assert len(made) == MAKEABLE
        assert made.total() - MAKEABLE <= BATCH, (last, made)
        assert data_files(Path(config.output.uri)) == data_files(Path(whole.output.uri)), last
        if not is_done:
            assert staged(config) == []


def test_what_dies_between_commit_and_clean_up_is_cleaned_at_the_end_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(tmp_path, "webdataset")
    life = Life(4 + 4)  # the writes that stage and publish the shard with its failed rows; none to clean up
    worker, _, plan = open_worker(config, monkeypatch, life)
    with pytest.raises(Death):
        worker.make(plan.shards[0]).finish()
    assert life.writes[-1] == "_run/commits/00000.json"
    assert len(staged(config)) == 4
    # The files that the driver writes before the workers begin.
    Store(config.output.uri).write(PLAN, plan.to_parquet())
    Store(config.output.uri).write(JOB, config.to_yaml().encode())
    monkeypatch.setattr(flux_batch.worker.worker, "Store", Store)

    report = run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)

    assert report.is_complete
    assert report.num_new_images == 0
    assert not Path(config.output.uri, "_run/staging").exists()


def test_a_worker_killed_again_and_again_still_gets_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each life lasts for three writes, enough for one batch: its mark, its images, and the removal of the mark."""
    whole = job(tmp_path / "whole", "webdataset")
    worker, _, plan = open_worker(whole, monkeypatch)
    worker.make(plan.shards[0]).finish()

    config = job(tmp_path / "killed", "webdataset")
    made: Counter[str] = Counter()
    lost = 0
    for _ in range(20):
        worker, pipeline, plan = open_worker(config, monkeypatch, Life(3))
        try:
            worker.make(plan.shards[0], Attempt(number=1 + lost, lost=lost)).finish()
            break
        except Death:
            lost += 1
        finally:
            made.update(pipeline.made)

    assert lost >= 3
    assert made.total() - MAKEABLE <= lost * BATCH
    assert data_files(Path(config.output.uri)) == data_files(Path(whole.output.uri))
    assert {row["status"] for row in metadata(config)[:7]} == {"success"}


# --- in buckets

PROMPTS = [f"image {number}" for number in range(8)]


def bucket_job(folder: Path, server: Any, name: str) -> JobConfig:
    output = {"uri": f"{server.uri}/{name}", "storage_options": server.storage_options, "shard_size": 8}
    return make_job(folder / name, [{"prompt": prompt} for prompt in PROMPTS], output=output)


def objects(config: JobConfig) -> dict[str, bytes]:
    store = Store(config.output.uri, config.output.storage_options)
    return {key: store.read(key) for folder in ("train", "metadata", "_run/staging") for key in store.list(folder)}


@pytest.mark.s3
def test_staged_images_are_adopted_from_a_bucket(
    tmp_path: Path, s3_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = bucket_job(tmp_path, s3_store, "whole"), bucket_job(tmp_path, s3_store, "killed")
    worker, _, plan = open_worker(whole, monkeypatch)
    worker.make(plan.shards[0]).finish()

    life = Life(2)
    worker, _, plan = open_worker(killed, monkeypatch, life)
    with pytest.raises(Death):
        worker.make(plan.shards[0]).finish()
    assert len(life.writes) == 2
    worker, pipeline, plan = open_worker(killed, monkeypatch)
    result = worker.make(plan.shards[0], Attempt(number=2, lost=1, reason="its worker died")).finish()

    assert pipeline.made == PROMPTS[4:]
    assert result.is_new
    assert objects(killed) == objects(whole)
    assert sorted(objects(killed)) == ["metadata/00000.parquet", "train/00000.tar"]
