"""`compare`: the differences between two runs, image by image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flux_batch.cli import main
from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.job import run
from flux_batch.output.annotations import annotation_schema, pack_annotations
from flux_batch.report.compare import compare_runs
from flux_batch.storage.store import Store
from helpers.fakes import make_fake_pipeline
from helpers.job_files import make_job, metadata

ROWS = [
    {"prompt": "one", "id": "a", "quality": 0.5, "width": 16},
    {"prompt": "two", "id": "b", "quality": 0.7, "width": 32},
    {"prompt": "[raise]", "id": "c", "quality": 0.1},
]


def make_run(folder: Path, rows: list[dict[str, Any]], **sections: Any) -> JobConfig:
    config = make_job(folder, rows, prompts={"passthrough": ["quality"]}, failures={"max_ratio": 1}, **sections)
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    return config


def annotate(config: JobConfig, values: list[float | None]) -> None:
    """Write an annotation of the first shard, which contains all images."""
    keys = [row["key"] for row in metadata(config)]
    rows = [{"key": key, "likes": value} for key, value in zip(keys, values, strict=True)]
    schema = annotation_schema(pa.schema([("likes", pa.float64())]))
    Store(config.output.uri).write("annotations/fans/00000.parquet", pack_annotations(rows, schema))


def test_runs_differ_in_images_and_scores(tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    rows[1] |= {"prompt": "three", "width": 16}
    rows[2] |= {"prompt": "fine now", "quality": 0.7}
    new = {"prompt": "new", "id": "d", "quality": 0.0}
    one, two = make_run(tmp_path / "a", ROWS), make_run(tmp_path / "b", [new, *reversed(rows)])
    annotate(one, [1.0, 2.0, None])
    annotate(two, [9.0, 9.0, float("nan"), 4.0])
    found = compare_runs(Store(one.output.uri), Store(two.output.uri))
    assert (found.num_images, found.num_failed, found.num_in_both) == ([3, 4], [1, 0], 3)
    # The files contain their keys, so they differ.
    assert (found.num_equal, found.num_differ, found.num_failed_in_one) == (0, 2, 1)
    assert (found.settings, found.versions, dict(found.rows)) == ({}, {}, {"prompt": 2, "width": 1})
    assert {key: apart and apart.max_levels for key, apart in found.pixels.items()} == {
        "000000000": 0,
        "000000001": None,
    }
    assert found.scores == {"fans.likes": (1.0, 4.0), "quality": (pytest.approx(1.3 / 3), pytest.approx(1.9 / 3))}
    assert found.text.splitlines()[2:] == [
        "images   3 (1 failed) and 4 (0 failed); of 3 in both, 0 have equal files, 2 other ones, 1 failed in one run",
        "rows     prompt differs in 2 of them",
        "         width differs in 1 of them",
        "pixels   000000000: equal pixels",
        "         000000001: is of another size",
        "scores   fans.likes: mean 1 -> 4",
        "         quality: mean 0.4333 -> 0.6333",
    ]


def test_runs_differ_in_settings_and_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make_run(tmp_path / "a", ROWS)
    two = make_run(tmp_path / "b", ROWS, sampling={"num_inference_steps": 3}, output={"shard_size": 2})
    store = Store(two.output.uri)
    record = json.loads(store.read("_run/precision.json"))
    store.write("_run/precision.json", json.dumps(record | {"dtype": "bfloat16"}).encode())
    store.delete("metadata/00001.parquet")
    capsys.readouterr()
    assert main(["compare", one.output.uri, two.output.uri, "--images", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5] == [
        "settings output.shard_size: 4 -> 2",
        "         sampling.num_inference_steps: 2 -> 3",
        "versions settled dtype: 'float32' -> 'bfloat16'",
    ]
    (pixels,) = [line for line in lines if line.startswith("pixels")]
    assert pixels.startswith("pixels   000000000: differs by at most 2")
    assert lines[-1] == f"problems {two.output.uri}: metadata/00001.parquet is missing"
    assert main(["compare", one.output.uri, one.output.uri, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["num_equal"], said["num_differ"], said["settings"], said["pixels"]) == (2, 0, {}, {})
    assert main(["compare", one.output.uri, str(tmp_path / "none")]) == 2
    assert "there is no run here" in capsys.readouterr().err
    assert main(["compare", one.output.uri, one.output.uri, "--images", "-1"]) == 2


def test_versions_that_are_not_known_yet_do_not_differ(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "a", ROWS), make_run(tmp_path / "b", ROWS)
    store = Store(one.output.uri)
    store.delete("_run/report.json")  # as of a run at work, whose first worker has begun

    found = compare_runs(store, Store(two.output.uri))

    assert found.versions == {}
    assert found.problems == [f"{one.output.uri}: has no report yet, so its versions are not all known"]
    store.delete("_run/precision.json")
    assert compare_runs(store, Store(two.output.uri)).versions == {}
