"""Shards with several workers: use of staged images, stops, and two shards at a time."""

from __future__ import annotations

import io
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from flux_batch.config.schema import JobConfig
from flux_batch.errors import DeviceFatal, Stopped
from flux_batch.output.paths import RunFolder
from flux_batch.output.staging import StagedImage, Staging, staged_record
from flux_batch.records import Attempt, Shard, ShardResult
from flux_batch.storage.store import Store
from flux_batch.worker.worker import Worker
from helpers.fakes import FakePipeline
from helpers.job_files import data_files, make_job, metadata
from helpers.mortal import PROMPTS, Death, Life, MortalPipeline, one_shard_job, open_worker, run_shard, staged
from helpers.waiting import PATIENCE_S, wait_until


def die_after(config: JobConfig, monkeypatch: pytest.MonkeyPatch, num_writes: int) -> list[str]:
    """Run a worker that dies after some writes. Returns: the prompts whose images it staged."""
    life = Life(num_writes)
    worker, _, plan = open_worker(config, monkeypatch, life)
    with pytest.raises(Death):
        worker.make(plan.shards[0]).finish()
    staging = Staging(RunFolder(Store(config.output.uri), 1))
    return sorted(one.record["prompt"] for name in staging.list(0).objects for one in staging.read(0, name))


def undisturbed(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, bytes]:
    config = one_shard_job(folder / "undisturbed", **options)
    run_shard(config, monkeypatch)
    return data_files(Path(config.output.uri))


def test_what_a_lost_worker_staged_is_adopted_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_shard_job(tmp_path)
    assert die_after(config, monkeypatch, 2) == PROMPTS[:4]

    result, pipeline = run_shard(config, monkeypatch)

    assert pipeline.calls == [PROMPTS[4:6], PROMPTS[6:]]
    assert (result.num_images, result.is_new) == (8, True)
    assert data_files(Path(config.output.uri)) == undisturbed(tmp_path, monkeypatch)
    assert staged(config) == []


@pytest.mark.parametrize("sources", [0, 1])
def test_images_as_large_as_their_references_are_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: int
) -> None:
    """No row has their size, but the staged record does. Their source images are staged with them."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32)).save(buffer, "PNG")
    rows = [{"prompt": prompt, "reference_image": [buffer.getvalue()]} for prompt in PROMPTS]
    output = {"shard_size": 8, "sources": sources}
    config = make_job(tmp_path, rows, output=output, sampling={"resize_references": False})
    assert die_after(config, monkeypatch, 2) == PROMPTS[:4]

    _, pipeline = run_shard(config, monkeypatch)

    assert pipeline.calls == [PROMPTS[4:6], PROMPTS[6:]]
    assert {(row["width"], row["height"]) for row in metadata(config)} == {(64, 32)}
    resumed = data_files(Path(config.output.uri))
    whole = config.model_copy(update={"output": config.output.model_copy(update={"uri": str(tmp_path / "whole")})})
    run_shard(whole, monkeypatch)
    assert data_files(tmp_path / "whole") == resumed


def test_images_are_staged_before_the_shard_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_shard_job(tmp_path, batch_size=8)
    life = Life()
    worker, _, plan = open_worker(config, monkeypatch, life)

    worker.make(plan.shards[0]).finish()

    folders = [key.rpartition("/")[0] for key in life.writes]
    staging = "_run/staging/00000"
    assert folders == [staging, "train", "metadata", "_run/commits", staging]


def test_all_batches_are_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_shard_job(tmp_path)
    life = Life()
    worker, _, plan = open_worker(config, monkeypatch, life)

    worker.make(plan.shards[0]).finish()

    folders = Counter(key.rpartition("/")[0] for key in life.writes)
    assert folders == {"_run/staging/00000": 4 + 4, "train": 1, "metadata": 1, "_run/commits": 1}  # written and removed


@pytest.mark.parametrize("how", ["changed", "cut", "emptied", "foreign"])
def test_damaged_objects_are_made_again_in_their_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    config = one_shard_job(tmp_path)
    die_after(config, monkeypatch, 2)
    staging = Staging(RunFolder(Store(config.output.uri), 1))
    (path,) = (path for path in staged(config) if staging.read(0, path.name)[0].record["prompt"] == PROMPTS[2])
    data = path.read_bytes()
    place = data.index(b"IDAT") + 9
    path.write_bytes(
        {
            "changed": data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :],
            "cut": data[:place],
            "emptied": b"",
            "foreign": b"PAR1 but not for long",
        }[how]
    )

    _, pipeline = run_shard(config, monkeypatch)

    assert pipeline.calls == [PROMPTS[2:4], PROMPTS[4:6], PROMPTS[6:]]
    assert data_files(Path(config.output.uri)) == undisturbed(tmp_path, monkeypatch)
    assert staged(config) == []


@pytest.mark.parametrize("change", [{"seed": 4}, {"prompt": "another"}, {"embedded_guidance": 9.0}, {"lora": "x"}])
def test_only_images_that_the_plan_requests_are_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    config = one_shard_job(tmp_path)
    die_after(config, monkeypatch, 2)
    staging = Staging(RunFolder(Store(config.output.uri), 1))
    for name in staging.list(0).objects:
        others = [StagedImage(one.key, {**one.record, **change}, one.data) for one in staging.read(0, name)]
        Path(config.output.uri, "_run/staging/00000", name).unlink()
        staging.put(0, others)
    staging.put(0, [StagedImage("000009999", {"prompt": "of no row"}, b"x")])

    _, pipeline = run_shard(config, monkeypatch)

    assert pipeline.made == PROMPTS
    assert data_files(Path(config.output.uri)) == undisturbed(tmp_path, monkeypatch)


def test_failed_rows_are_adopted_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["a [raise]", *PROMPTS[1:]]
    config = one_shard_job(tmp_path, prompts)
    assert die_after(config, monkeypatch, 1) == prompts[:2]

    _, pipeline = run_shard(config, monkeypatch)

    assert pipeline.calls[0] == prompts[2:4]
    assert data_files(Path(config.output.uri)) == undisturbed(tmp_path, monkeypatch, prompts=prompts)


def test_failed_rows_are_made_again_if_asked_and_a_later_success_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = one_shard_job(tmp_path)
    staging = Staging(RunFolder(Store(config.output.uri), 1))
    assert die_after(config, monkeypatch, 1) == PROMPTS[:2]
    (name,) = staging.list(0).objects
    failure = {"error_type": "RuntimeError", "error_message": "out of luck"}
    made = staging.read(0, name)
    staging.put(0, [replace(image, record={**image.record, **failure}, data=b"") for image in made])
    staging.discard(0, [name])

    worker, pipeline, plan = open_worker(config, monkeypatch, Life(1), retry_failed=True)
    with pytest.raises(Death):
        worker.make(plan.shards[0])
    assert pipeline.calls[0] == PROMPTS[:2]
    _, pipeline = run_shard(config, monkeypatch)  # both the failure and the image are staged now

    assert PROMPTS[0] not in pipeline.made
    assert data_files(Path(config.output.uri)) == undisturbed(tmp_path, monkeypatch)


def test_the_good_images_of_a_finished_shard_can_be_staged_to_retry_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run --retry-failed` does this."""
    config = one_shard_job(tmp_path, ["a", "b [raise]", "c", "d"])
    run_shard(config, monkeypatch)
    before = metadata(config)
    store = Store(config.output.uri)
    good = [row for row in before if row["status"] == "success"]
    made = images_of(config)
    Staging(RunFolder(store, 1)).put(0, [StagedImage(row["key"], staged_record(row), made[row["key"]]) for row in good])
    for key in ["_run/commits/00000.json", "metadata/00000.parquet", "train/00000.tar"]:
        store.delete(key)

    _, pipeline = run_shard(config, monkeypatch)

    assert pipeline.calls == [["b [raise]"]]
    assert metadata(config) == before
    assert images_of(config) == made


def images_of(config: JobConfig) -> dict[str, bytes]:
    import tarfile

    with tarfile.open(Path(config.output.uri, "train/00000.tar")) as tar:
        members = [member for member in tar if member.name.endswith(".png")]
        return {member.name.removesuffix(".png"): tar.extractfile(member).read() for member in members}  # type: ignore[union-attr]


# --- two workers on one shard


def test_a_speculative_attempt_makes_the_last_batches_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_shard_job(tmp_path)

    _, pipeline = run_shard(config, monkeypatch, Attempt(reverse_order=True))

    assert pipeline.calls == [PROMPTS[6:], PROMPTS[4:6], PROMPTS[2:4], PROMPTS[:2]]
    assert data_files(Path(config.output.uri)) == undisturbed(tmp_path, monkeypatch)


class InStep(MortalPipeline):
    """Begins each batch together with the other worker, or alone once that one has no batch left."""

    def __init__(self, life: Life, step: threading.Barrier) -> None:
        super().__init__(life)
        self._step = step

    def __call__(self, prompt: Any, **others: Any) -> Any:
        with suppress(threading.BrokenBarrierError):
            self._step.wait()
        return super().__call__(prompt, **others)


def test_two_workers_meet_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"image {number}" for number in range(20)]
    config = one_shard_job(tmp_path, prompts)
    step = threading.Barrier(2)
    lives = Life(), Life()
    pipelines = [InStep(life, step) for life in lives]
    workers = [
        open_worker(config, monkeypatch, life, pipeline)[0] for life, pipeline in zip(lives, pipelines, strict=True)
    ]
    _, _, plan = open_worker(config, monkeypatch)
    attempts = Attempt(), Attempt(reverse_order=True)
    results: list[ShardResult] = []

    def work(worker: Worker, shard: Shard, attempt: Attempt) -> None:
        made = worker.make(shard, attempt)
        step.abort()
        results.append(made.finish())

    threads = [
        threading.Thread(target=work, args=(worker, plan.shards[0], attempt), daemon=True)
        for worker, attempt in zip(workers, attempts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)

    assert [result.num_images for result in results] == [20, 20]
    calls = [len(pipeline.calls) for pipeline in pipelines]
    assert min(calls) >= 3
    assert sum(calls) <= 10 + 4  # each may repeat the other's current and last batch
    assert data_files(Path(config.output.uri)) == undisturbed(tmp_path, monkeypatch, prompts=prompts)
    assert staged(config) == []


def test_a_worker_stops_as_soon_as_another_has_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_shard_job(tmp_path)
    other, _, plan = open_worker(config, monkeypatch)
    monkeypatch.setattr(other, "_publisher", replace(other._publisher, worker="elsewhere:1"))

    class Overtaken(FakePipeline):
        def __call__(self, *args: Any, **others: Any) -> Any:
            if self.num_calls == 1:
                wait_until(lambda: len(staged(config)) == 1)
                other.make(plan.shards[0]).finish()
            return super().__call__(*args, **others)

    pipeline = Overtaken()
    worker, _, plan = open_worker(config, monkeypatch, pipeline=pipeline)

    result = worker.make(plan.shards[0]).finish()

    assert (result.num_images, result.worker, result.is_new) == (8, "elsewhere:1", False)
    assert pipeline.num_calls in (2, 3)  # it checks for a commit while it makes a batch
    assert staged(config) == []


# --- stop and signs of life


def test_a_stopped_worker_stages_its_batch_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_shard_job(tmp_path)
    workers: list[Worker] = []

    class Stopping(FakePipeline):
        def __call__(self, *args: Any, **others: Any) -> Any:
            if self.num_calls == 1:
                workers[0].stop()
            return super().__call__(*args, **others)

    worker, pipeline, plan = open_worker(config, monkeypatch, pipeline=Stopping())
    workers.append(worker)

    with pytest.raises(Stopped, match="shard 00000: stopped with 4 of 8 images"):
        worker.make(plan.shards[0]).finish()
    with pytest.raises(Stopped):
        worker.make(plan.shards[0]).finish()
    assert pipeline.num_calls == 2
    assert len(staged(config)) == 2

    _, pipeline = run_shard(config, monkeypatch)
    assert pipeline.calls == [PROMPTS[4:6], PROMPTS[6:]]


def test_a_worker_stopped_after_another_has_committed_leaves_nothing_staged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If its driver was paused past its lease and then wakes, its current batch ends after the end of the run."""
    config = one_shard_job(tmp_path)
    other, _, plan = open_worker(config, monkeypatch)
    workers: list[Worker] = []

    class Late(FakePipeline):
        def __call__(self, *args: Any, **others: Any) -> Any:
            if self.num_calls == 1:
                wait_until(lambda: len(staged(config)) == 1)
                other.make(plan.shards[0]).finish()
                workers[0].stop()
            return super().__call__(*args, **others)

    worker, _, plan = open_worker(config, monkeypatch, pipeline=Late())
    workers.append(worker)

    assert worker.make(plan.shards[0]).finish().num_images == 8
    assert staged(config) == []


def test_a_stop_in_the_last_batch_still_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_shard_job(tmp_path, batch_size=8)
    workers: list[Worker] = []

    class Stopping(FakePipeline):
        def __call__(self, *args: Any, **others: Any) -> Any:
            workers[0].stop()
            return super().__call__(*args, **others)

    worker, _, plan = open_worker(config, monkeypatch, pipeline=Stopping())
    workers.append(worker)

    assert worker.make(plan.shards[0]).finish().num_images == 8


def test_a_lost_device_loses_only_the_batch_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_shard_job(tmp_path)

    class Broken(FakePipeline):
        def __call__(self, *args: Any, **others: Any) -> Any:
            if self.num_calls == 2:
                raise DeviceFatal("the device fell off the bus")
            return super().__call__(*args, **others)

    worker, _, plan = open_worker(config, monkeypatch, pipeline=Broken())
    with pytest.raises(DeviceFatal):
        worker.make(plan.shards[0], Attempt(number=2, lost=1)).finish()

    listed = Staging(RunFolder(Store(config.output.uri), 1)).list(0)
    assert len(listed.objects) == 2
    assert listed.tries == {"b2": 1}  # as if a process had died in the batch


def test_a_worker_is_idle_only_between_signs_of_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_shard_job(tmp_path)
    workers: list[Worker] = []
    now = 1000.0
    monkeypatch.setattr("flux_batch.telemetry.time", SimpleNamespace(monotonic=lambda: now))

    def is_idle_while_time_passes() -> bool:
        nonlocal now
        before = workers[0].idle_s()
        now += 100
        return workers[0].idle_s() - before == 100

    class Watched(FakePipeline):
        def __call__(self, *args: Any, **others: Any) -> Any:
            wait_until(lambda: len(staged(config)) == self.num_calls)
            wait_until(lambda: workers[0].idle_s() == 0)  # the previous batch was progress
            wait_until(is_idle_while_time_passes)  # a staged file may be visible before its sign of progress
            return super().__call__(*args, **others)

    worker, _, plan = open_worker(config, monkeypatch, pipeline=Watched())
    workers.append(worker)
    assert worker.idle_s() == 0

    worker.make(plan.shards[0]).finish()

    assert worker.idle_s() == 0
    assert now >= 1400


# --- two shards at a time


def test_a_shard_is_published_while_the_next_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    config = make_job(tmp_path, rows, output={"shard_size": 4}, workers={"batch_size": 2})
    pipeline = FakePipeline()
    worker, _, plan = open_worker(config, monkeypatch, pipeline=pipeline)
    may_publish = threading.Event()
    publish = worker._publisher.publish

    def wait_and_publish(*args: Any) -> Any:
        assert may_publish.wait(30)
        return publish(*args)

    monkeypatch.setattr(type(worker._publisher), "publish", lambda _, *args: wait_and_publish(*args))
    with ThreadPoolExecutor(1) as finisher:
        first = finisher.submit(worker.make(plan.shards[0]).finish)
        second = worker.make(plan.shards[1])
        assert pipeline.num_calls == 4
        assert not first.done()
        may_publish.set()
        results = [first.result(), second.finish()]

    assert [(result.shard, result.num_images, result.is_new) for result in results] == [(0, 4, True), (1, 4, True)]
    assert worker.idle_s() == 0
