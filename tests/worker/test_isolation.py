"""Rows that kill their worker: found alone, and the others made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flux_batch.config.schema import JobConfig
from flux_batch.errors import StoreError
from flux_batch.output.paths import RunFolder
from flux_batch.output.staging import Staging
from flux_batch.records import Attempt
from flux_batch.storage.store import Store
from helpers.fakes import FakePipeline
from helpers.job_files import metadata
from helpers.mortal import PROMPTS, Death, Life, MortalPipeline, one_shard_job, open_worker, run_shard, staged


def run_to_the_end(config: JobConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[MortalPipeline]]:
    """Run a shard as an engine does, with a new worker after each that dies. Returns: the losses, the pipelines."""
    pipelines: list[MortalPipeline] = []
    for lost in range(20):
        worker, pipeline, plan = open_worker(config, monkeypatch)
        pipelines.append(pipeline)
        try:
            worker.make(plan.shards[0], Attempt(number=1, lost=lost, reason="its worker died" if lost else "")).finish()
            return lost, pipelines
        except Death:
            continue
    raise AssertionError("no end in sight")


def test_a_row_that_kills_its_process_is_found_and_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [*PROMPTS[:5], "poison [die]", *PROMPTS[6:], "more", "and more"]
    config = one_shard_job(tmp_path, prompts, batch_size=4)

    lost, pipelines = run_to_the_end(config, monkeypatch)

    assert lost == 4  # in its batch, in its marked batch, and twice alone
    rows = metadata(config)
    assert [row["prompt"] for row in rows if row["status"] == "failed"] == ["poison [die]"]
    assert (rows[5]["error_type"], rows[5]["error_message"]) == (
        "WorkerLost",
        "2 workers were lost while they made this image alone; the last: its worker died",
    )
    made = Counter(prompt for pipeline in pipelines for prompt in pipeline.made)
    assert set(made.values()) == {1}
    assert len(made) == 9
    assert [pipeline.calls for pipeline in pipelines] == [
        [PROMPTS[:4], ["image 4", "poison ", "image 6", "image 7"]],
        [["image 4", "poison ", "image 6", "image 7"]],
        [["more", "and more"], ["image 4"], ["poison "]],
        [["image 6"], ["image 7"], ["poison "]],
        [],
    ]
    calm = [prompt.replace("[die]", "") for prompt in prompts]
    other = one_shard_job(tmp_path / "calm", calm, batch_size=4)
    run_shard(other, monkeypatch)
    assert [row["sha256"] for row in rows if row["status"] == "success"] == [
        row["sha256"] for row in metadata(other) if row["prompt"] != "poison "
    ]
    assert staged(config) == []


@pytest.mark.parametrize("retry_failed", [False, True])
def test_an_image_that_was_lost_twice_alone_is_made_again_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retry_failed: bool
) -> None:
    """Two kills from outside may have hit it."""
    other, config = one_shard_job(tmp_path / "other"), one_shard_job(tmp_path / "lost")
    run_shard(other, monkeypatch)
    staging = Staging(RunFolder(Store(config.output.uri), 1))
    for worker in ("one", "two"):
        staging.mark_started(0, metadata(other)[5]["key"], worker)

    run_shard(config, monkeypatch, retry_failed=retry_failed)

    failed = {row["prompt"]: row["error_type"] for row in metadata(config) if row["error_type"]}
    assert failed == ({} if retry_failed else {PROMPTS[5]: "WorkerLost"})
    assert staged(config) == []


def test_two_rows_of_one_batch_that_kill_their_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_shard_job(tmp_path, ["a", "first [die]", "b", "second [die]"], batch_size=4)

    lost, _ = run_to_the_end(config, monkeypatch)

    assert lost == 6
    assert [(row["prompt"], row["error_type"]) for row in metadata(config)] == [
        ("a", None),
        ("first [die]", "WorkerLost"),
        ("b", None),
        ("second [die]", "WorkerLost"),
    ]


def test_a_batch_of_one_that_kills_its_process_is_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_shard_job(tmp_path, ["a", "poison [die]", "b"], batch_size=1)

    lost, _ = run_to_the_end(config, monkeypatch)

    assert lost == 3
    assert [row["error_type"] for row in metadata(config)] == [None, "WorkerLost", None]


def test_after_a_loss_no_batch_is_begun_before_the_last_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = one_shard_job(tmp_path)
    life = Life()

    class Sudden(FakePipeline):
        def __call__(self, *args: Any, **others: Any) -> Any:
            if self.num_calls == 2:
                life.end()
            return super().__call__(*args, **others)

    worker, _, plan = open_worker(config, monkeypatch, life, Sudden())
    with pytest.raises(Death):
        worker.make(plan.shards[0], Attempt(number=1, lost=1)).finish()

    listed = Staging(RunFolder(Store(config.output.uri), 1)).list(0)
    assert len(listed.objects) == 2
    assert listed.tries == {"b2": 1}


def test_an_error_leaves_no_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that raises an error has survived, so that its mark is removed."""
    config = one_shard_job(tmp_path)
    worker, _, plan = open_worker(config, monkeypatch)

    def away(*args: Any) -> Any:
        raise StoreError("the store is away")

    monkeypatch.setattr(worker._maker, "make", away)
    with pytest.raises(StoreError):
        worker.make(plan.shards[0], Attempt(number=3, lost=2)).finish()

    assert staged(config) == []


def test_a_first_attempt_leaves_no_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_shard_job(tmp_path)
    life = Life()
    worker, _, plan = open_worker(config, monkeypatch, life)

    worker.make(plan.shards[0]).finish()

    assert not [key for key in life.writes if "try-" in key]
