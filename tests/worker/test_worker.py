from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flux_batch.errors import DeviceFatal, NotFound, OutOfMemory, Stopped
from flux_batch.images import read_provenance
from flux_batch.output.paths import PLAN
from flux_batch.plan.plan import make_plan
from flux_batch.storage.retry import RetryPolicy
from flux_batch.storage.store import Store
from flux_batch.worker.worker import WorkerFactory
from helpers.fakes import FakePipeline, fake_image, make_fake_pipeline
from helpers.worker_runs import FORMATS, files_of, images, make_job, metadata, open_worker, pixels_of, render

HOSTILE = [
    'say "cheese",\nplease',
    "猫と犬 🐈‍⬛",
    "x" * 2000,
    "tab\tand \\ and 'quote'",
    "a\x01b\x7f",
    "<&>]]>",
    "dup",
    "dup",
]


@pytest.mark.parametrize("layout", FORMATS)
def test_each_prompt_becomes_its_image_once(tmp_path: Path, layout: str) -> None:
    config = make_job(tmp_path, HOSTILE, output={"format": layout})

    render(config)

    rows, made = metadata(config), images(config)
    assert [row["prompt"] for row in rows] == HOSTILE
    assert [row["key"] for row in rows] == sorted(made)
    assert {row["status"] for row in rows} == {"success"}
    for row in rows:
        data = made[row["key"]]
        expected = fake_image(row["prompt"], seed=row["seed"], width=64, height=48, num_inference_steps=3)
        assert np.array_equal(pixels_of(data), expected)
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert row["bytes"] == len(data)
        assert Path(config.output.uri, row["file_name"]).is_file()
        inside = read_provenance(data)
        assert (inside["prompt"], inside["seed"], inside["key"]) == (row["prompt"], row["seed"], row["key"])


@pytest.mark.parametrize("image_type", ["jpeg", "webp"])
def test_other_image_types_have_their_size_and_prompt(tmp_path: Path, image_type: str) -> None:
    config = make_job(tmp_path, HOSTILE, output={"image": {"type": image_type}})

    render(config)

    made = images(config)
    for row in metadata(config):
        assert pixels_of(made[row["key"]]).shape == (48, 64, 3)
        assert read_provenance(made[row["key"]])["prompt"] == row["prompt"]


@pytest.mark.parametrize("image_type", ["png", "jpeg", "webp"])
def test_a_very_long_prompt_is_made_and_recorded(tmp_path: Path, image_type: str) -> None:
    prompts = ["猫" * 30_000, "short"]
    config = make_job(tmp_path, prompts, output={"image": {"type": image_type}})

    render(config)

    assert [(row["prompt"], row["status"]) for row in metadata(config)] == [(text, "success") for text in prompts]


def test_a_negative_prompt_that_is_cut_counts_where_it_is_used(tmp_path: Path) -> None:
    long = {"prompt": "short", "negative_prompt": "x" * 100, "t5_sequence_length": 99}
    rows = [long | {"cfg_scale": scale} for scale in (1.0, 2.0, 0.5)]
    config = make_job(tmp_path, [*rows, long | {"cfg_scale": 2.0, "t5_sequence_length": 200}])

    render(config)

    truncated = [(row["clip_truncated"], row["t5_truncated"]) for row in metadata(config)]
    assert truncated == [(False, False), (True, True), (True, True), (True, False)]


def test_rows_override_the_defaults(tmp_path: Path) -> None:
    rows = [
        {"prompt": "plain"},
        {"prompt": "own size", "width": 32, "height": 16},
        {"prompt": "own words", "negative_prompt": "blur", "true_cfg_scale": 4.0, "guidance_scale": 2.0},
        {"prompt": "own seed", "seed": 7, "num_images_per_prompt": 2, "num_inference_steps": 9},
        {"prompt": "own length", "max_sequence_length": 5},
    ]
    config = make_job(tmp_path, rows)

    render(config)

    plain, size, words, seed, again, length = metadata(config)
    assert (plain["width"], plain["height"], plain["embedded_guidance"]) == (64, 48, 3.5)
    assert (size["width"], size["height"]) == (32, 16)
    assert (words["negative_prompt"], words["cfg_scale"], words["embedded_guidance"]) == ("blur", 4.0, 2.0)
    assert [(row["key"], row["seed"], row["image_index"]) for row in (seed, again)] == [
        ("000000003", 7, 0),
        ("000000003_1", 8, 1),
    ]
    assert (length["t5_sequence_length"], length["t5_truncated"]) == (5, True)
    assert (plain["t5_sequence_length"], plain["t5_truncated"]) == (512, False)
    made = images(config)
    assert pixels_of(made[size["key"]]).shape == (16, 32, 3)
    expected = fake_image(
        "own words",
        negative_prompt="blur",
        seed=words["seed"],
        height=48,
        num_inference_steps=3,
        embedded_guidance=2.0,
        cfg_scale=4.0,
    )
    assert np.array_equal(pixels_of(made[words["key"]]), expected)


def test_several_images_of_a_prompt_differ(tmp_path: Path) -> None:
    config = make_job(tmp_path, ["one", "two"], sampling={"num_images_per_prompt": 3})

    render(config)

    rows = metadata(config)
    assert [(row["prompt"], row["image_index"]) for row in rows] == [
        (prompt, index) for prompt in ("one", "two") for index in range(3)
    ]
    assert len({row["seed"] for row in rows}) == len({row["sha256"] for row in rows}) == 6
    assert len(images(config)) == 6


@pytest.mark.parametrize("layout", FORMATS)
def test_bad_rows_are_recorded_with_their_reason_and_cost_nobody_else(tmp_path: Path, layout: str) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "good"},
        {"prompt": None},
        {"prompt": "  "},
        {"prompt": "size", "width": 1000},
        {"prompt": "guidance", "embedded_guidance": float("nan")},
        {"prompt": "steps", "num_inference_steps": -1},
        {"prompt": "good too", "tag": "kept"},
    ]
    config = make_job(tmp_path, rows, prompts={"passthrough": ["tag"]}, output={"format": layout})

    results = render(config)

    found = metadata(config)
    assert [row["status"] for row in found] == ["success", *["failed"] * 5, "success"]
    assert sorted(images(config)) == ["000000000", "000010002"]
    assert sum(result.num_failed for result in results) == 5
    assert sum(result.num_images for result in results) == 7
    reasons = [row["error_message"] for row in found[1:6]]
    for reason, words in zip(
        reasons,
        ["'prompt' is null", "'prompt' is empty", "width = 1000", "embedded_guidance = nan", "steps = -1"],
        strict=True,
    ):
        assert words in reason
    assert "prompts.parquet:3" in reasons[2]
    for row in found[1:6]:
        assert row["error_type"] in {"RowError", "InvalidSetting"}
        assert row["file_name"] is row["sha256"] is row["bytes"] is None
    assert [row["prompt"] for row in found[1:6]] == ["", "  ", "size", "guidance", "steps"]
    assert [row["tag"] for row in found] == [None] * 6 + ["kept"]
    failed = files_of(config, "_run/failed")
    assert sorted(failed) == ["_run/failed/00000.parquet", "_run/failed/00001.parquet"]
    assert pq.read_table(io.BytesIO(failed["_run/failed/00000.parquet"])).num_rows == 3


def test_a_shard_of_failures_only_commits_without_data(tmp_path: Path) -> None:
    config = make_job(tmp_path, [{"prompt": None, "n": 1}, {"prompt": "", "n": 2}])

    assert [(result.num_images, result.num_failed) for result in render(config)] == [(2, 2)]
    assert files_of(config, "train") == {}


def test_only_the_culprit_of_a_failed_batch_fails(tmp_path: Path) -> None:
    prompts = ["a", "b", "c [raise]", "d", "e", "f", "g", "h"]
    config = make_job(tmp_path, prompts, output={"shard_size": 8}, workers={"batch_size": 8})
    pipeline = FakePipeline()

    render(config, pipeline)

    rows = metadata(config)
    assert [row["prompt"] for row in rows if row["status"] == "failed"] == ["c [raise]"]
    culprit = rows[2]
    assert culprit["error_type"] == "RuntimeError"
    assert culprit["error_message"].startswith("asked to fail (fakes.py:")
    assert culprit["seed"] is not None
    assert len(images(config)) == 7
    assert [len(call) for call in pipeline.calls] == [8, 4, 2, 2, 1, 1, 4]


def test_a_batch_out_of_memory_is_made_in_smaller_ones(tmp_path: Path) -> None:
    prompts = ["a", "b [oom]", "c", "d"]
    config = make_job(tmp_path, prompts, workers={"batch_size": 4})

    render(config)

    assert {row["status"] for row in metadata(config)} == {"success"}


def test_a_lost_device_ends_the_shard_without_a_commit(tmp_path: Path) -> None:
    class Broken(FakePipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise DeviceFatal("the device fell off the bus")

    config = make_job(tmp_path, ["a"])
    with pytest.raises(DeviceFatal):
        render(config, Broken())

    assert files_of(config, ".") == {}


def test_an_image_does_not_depend_on_its_shard_and_batch(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{number % 5}", "id": f"row {number}", "width": 64 if number % 3 else 32} for number in range(11)
    ]
    hashes: list[dict[tuple[str, int], str]] = []
    for number, (shard_size, batch_size) in enumerate([(11, 1), (4, 3), (3, 11), (1, 2)]):
        config = make_job(
            tmp_path,
            rows,
            output={"uri": str(tmp_path / f"out{number}"), "shard_size": shard_size},
            workers={"batch_size": batch_size},
        )
        render(config)
        made = images(config)
        hashes.append({row["id"]: hashlib.sha256(pixels_of(made[row["key"]])).hexdigest() for row in metadata(config)})

    assert len(hashes[0]) == 11
    assert all(other == hashes[0] for other in hashes)


@pytest.mark.parametrize("layout", FORMATS)
def test_two_runs_leave_the_same_bytes(tmp_path: Path, layout: str) -> None:
    rows = [{"prompt": text, "tag": [text[:3]]} for text in HOSTILE] + [{"prompt": None, "tag": None}]
    found = []
    for number in range(2):
        output = {"uri": str(tmp_path / f"out{number}"), "format": layout}
        config = make_job(tmp_path, rows, output=output, prompts={"passthrough": ["tag"]})
        render(config)
        found.append(files_of(config, "train", "metadata", "_run/failed"))

    assert len(found[0]) >= 6
    assert found[0] == found[1]


def test_a_shard_whose_commit_was_lost_ends_in_the_same_bytes(tmp_path: Path) -> None:
    config = make_job(tmp_path, HOSTILE)
    render(config)
    before = files_of(config, "train", "metadata")
    path = Path(config.output.uri, "_run/commits/00001.json")
    commit = json.loads(path.read_text())

    path.unlink()
    render(config)

    assert files_of(config, "train", "metadata") == before
    of_try = dict.fromkeys(("device_s", "started_unix_time", "finished_unix_time", "stage_s"), ANY)
    assert json.loads(path.read_text()) == commit | of_try
    assert commit["stage_s"].keys() == {"read", "input", "make", "encode", "stage", "wait", "publish"}
    assert 0 < commit["started_unix_time"] <= commit["finished_unix_time"]


def test_a_committed_shard_is_not_rendered_again(tmp_path: Path) -> None:
    config = make_job(tmp_path, HOSTILE)
    first = render(config)
    pipeline = FakePipeline()

    again = render(config, pipeline)

    assert pipeline.num_calls == 0
    assert [(result.num_images, result.num_bytes) for result in again] == [
        (result.num_images, result.num_bytes) for result in first
    ]


def test_the_factory_pickles_small_and_opens_a_worker(tmp_path: Path) -> None:
    config = make_job(tmp_path, ["a"])
    plan = make_plan(config.prompts, config.output.shard_size)
    factory = WorkerFactory(config, len(plan.shards), plan.passthrough, make_fake_pipeline)
    Store(config.output.uri).write(PLAN, plan.to_parquet())

    data = pickle.dumps(factory)
    worker = pickle.loads(data).open()
    result = worker.make(pickle.loads(pickle.dumps(plan.shards[0]))).finish()

    assert len(data) < 5000
    assert pickle.loads(pickle.dumps(result)) == result
    assert (result.shard, result.num_images, result.error) == (0, 1, None)
    assert result.num_bytes > 0


def test_a_worker_whose_node_has_another_disk_makes_nothing(tmp_path: Path) -> None:
    """Otherwise its shards would look done, but the driver would find no commits at the end of every run."""
    config = make_job(tmp_path, ["a"])

    def make_pipeline(model: Any) -> FakePipeline:
        raise AssertionError("the model is loaded")

    factory = WorkerFactory(config, 1, pa.schema([]), make_pipeline)
    with pytest.raises(NotFound, match="where a worker starts; set output"):
        factory.open()


@pytest.mark.parametrize("shards", [10, 100_001])
def test_keys_have_no_dots_and_widen_with_the_run(tmp_path: Path, shards: int) -> None:
    config = make_job(tmp_path, ["a", "b"])
    plan = make_plan(config.prompts, 4)
    Store(config.output.uri).write(PLAN, plan.to_parquet())
    factory = WorkerFactory(config, shards, plan.passthrough, make_fake_pipeline)
    worker = factory.open()

    worker.make(plan.shards[0]).finish()

    digits = {10: "00000", 100_001: "000000"}[shards]
    assert list(images(config)) == [f"{digits}0000", f"{digits}0001"]
    assert json.loads((tmp_path / f"out/_run/commits/{digits}.json").read_text())["shard"] == 0


@pytest.mark.s3
def test_a_run_in_a_bucket_equals_one_on_disk(tmp_path: Path, s3_store: Any) -> None:
    here = make_job(tmp_path, HOSTILE, output={"uri": str(tmp_path / "out")})
    there = make_job(
        tmp_path, HOSTILE, output={"uri": f"{s3_store.uri}/run", "storage_options": s3_store.storage_options}
    )
    render(here)
    render(there)
    render(there)

    import fsspec

    fs, root = fsspec.url_to_fs(there.output.uri, **s3_store.storage_options)
    found = {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}
    assert {name: data for name, data in found.items() if name.startswith(("train/", "metadata/"))} == files_of(
        here, "train", "metadata"
    )
    assert Counter(name.split("/")[0] for name in found) == {"train": 2, "metadata": 2, "_run": 2}


def test_the_fake_pipeline_is_a_function_of_the_request_alone() -> None:
    settings: dict[str, Any] = {
        "negative_prompt": "n",
        "seed": 1,
        "width": 16,
        "height": 32,
        "num_inference_steps": 2,
        "embedded_guidance": 1.0,
        "cfg_scale": 2.0,
    }
    base = fake_image("p", **settings)

    assert base.shape == (32, 16, 3)
    assert np.array_equal(base, fake_image("p", **settings))
    changes: dict[str, Callable[[Any], Any]] = {
        name: (lambda value: value + "x") if isinstance(value, str) else (lambda value: value * 2)
        for name, value in settings.items()
    }
    for name, change in changes.items():
        assert not np.array_equal(base, fake_image("p", **settings | {name: change(settings[name])})), name


def test_a_shard_shorter_than_planned_is_an_error_about_the_file(tmp_path: Path) -> None:
    config = make_job(tmp_path, ["a", "b"])
    worker, plan = open_worker(config)
    shard = plan.shards[0]

    with pytest.raises(Exception, match=r"2 rows from row 0 where the plan has 3; the file changed"):
        worker.make(replace(shard, parts=(replace(shard.parts[0], num_rows=3),))).finish()


# --- options of DiffSynth, and too little memory


def test_the_pipeline_gets_the_options_of_the_job_and_no_others(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "sigma_shift": None}, {"prompt": "b", "sigma_shift": 5.0}]
    sampling = {"sigma_shift": 3.0, "tiled": True, "tile_size": 96, "tile_stride": 48, "cfg_scale": 0.5}
    config = make_job(tmp_path, rows, sampling={"width": 64, "height": 48} | sampling)
    pipeline = FakePipeline()

    render(config, pipeline)

    tiles = {"tiled": True, "tile_size": 96, "tile_stride": 48}
    assert pipeline.options == [{"sigma_shift": 3.0, **tiles}, {"sigma_shift": 5.0, **tiles}]
    rows = metadata(config)
    assert [(row["sigma_shift"], row["tile_size"], row["cfg_scale"]) for row in rows] == [
        (3.0, 96, 0.5),
        (5.0, 96, 0.5),
    ]

    plain = make_job(tmp_path, ["a"], output={"uri": str(tmp_path / "plain")})
    pipeline = FakePipeline()
    render(plain, pipeline)
    assert pipeline.options == [{}]
    (row,) = metadata(plain)
    assert (row["sigma_shift"], row["tile_size"], row["input_image"]) == (None, None, None)


def test_an_image_that_does_not_fit_is_made_in_tiles(tmp_path: Path) -> None:
    config = make_job(tmp_path, ["a", "b [oom whole]", "c"], workers={"batch_size": 4})
    pipeline = FakePipeline()

    render(config, pipeline)

    rows = metadata(config)
    assert {row["status"] for row in rows} == {"success"}
    assert [row["tile_size"] for row in rows] == [None, 64, None]
    assert [options for options in pipeline.options if options] == [{"tiled": True, "tile_size": 64, "tile_stride": 32}]


def test_tiles_that_are_too_large_become_smaller_and_then_the_row_fails(tmp_path: Path) -> None:
    class Full(FakePipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.options.append({name: kwargs[name] for name in ("tile_size", "tile_stride")})
            raise OutOfMemory("full")

    config = make_job(tmp_path, ["a"], sampling={"width": 64, "height": 48, "tiled": True})
    pipeline = Full()

    render(config, pipeline)

    (row,) = metadata(config)
    assert (row["error_type"], row["error_message"], row["tile_size"]) == ("OutOfMemory", "full", None)
    assert pipeline.options == [{"tile_size": 128, "tile_stride": 64}, {"tile_size": 64, "tile_stride": 32}]


def test_a_worker_that_waits_for_its_storage_hears_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise ConnectionError("no route to host")

    class Stopping(FakePipeline):
        def __call__(self, *args: Any, **others: Any) -> Any:
            monkeypatch.setattr(Store, "_write_local", away)
            worker.stop()
            return super().__call__(*args, **others)

    config = make_job(tmp_path, [{"prompt": "a"}], failures={"outage_s": 3600})
    worker, plan = open_worker(config, Stopping())

    with pytest.raises(Stopped, match="stopped while the storage is unavailable"):
        worker.make(plan.shards[0]).finish()


def test_a_stop_ends_requests_once_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies: list[RetryPolicy] = []

    class ItsStore(Store):
        def __init__(self, uri: str, options: Mapping[str, Any], policy: RetryPolicy) -> None:
            policies.append(policy)
            super().__init__(uri, options, policy)

    monkeypatch.setattr("flux_batch.worker.worker.Store", ItsStore)
    worker, _ = open_worker(make_job(tmp_path, ["one"], failures={"drain_s": 20}))
    worker.stop()
    now = itertools.count(time.monotonic(), 10)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))

    with pytest.raises(Stopped, match="does not answer"):
        policies[-1].wait_for(Future())
