"""The job files of jobs/: each is valid, and does what its comment says."""

from __future__ import annotations

import io
import json
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from flux_batch.cli import main
from flux_batch.config.schema import JobConfig
from flux_batch.demo.paths import demo_job_path
from flux_batch.demo.world.captions import PALETTE
from flux_batch.demo.world.reading import colour_share
from flux_batch.engine.local import LocalEngine
from flux_batch.job import load_job, run
from flux_batch.report.summary import RunReport
from flux_batch.storage.store import Store
from helpers.fakes import FakePipeline
from helpers.job_files import metadata, write_prompts
from helpers.s3 import KEY, SECRET, Bucket

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "jobs"
SMALL = ["sampling.width=32", "sampling.height=32", "sampling.t5_sequence_length=16"]
# The smallest settings at which the demo model follows its prompts.
DRAWABLE = ["sampling.width=64", "sampling.height=64", "sampling.t5_sequence_length=32"]


def load(name: str, *settings: str) -> JobConfig:
    return load_job(JOBS / name, settings, datetime(2026, 11, 23))


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run tests in the root of the repository, since paths in job files are relative to the working folder."""
    monkeypatch.chdir(ROOT)


def render(config: JobConfig, pipeline: FakePipeline) -> RunReport:
    return run(config, engine=LocalEngine(), make_pipeline=lambda model: pipeline)


@pytest.mark.parametrize(
    "path", sorted([*JOBS.glob("*.yaml"), *JOBS.glob("recipes/*.yaml")]), ids=lambda path: path.stem
)
def test_every_job_file_is_valid_and_says_how_to_run_it(path: Path) -> None:
    name = path.relative_to(JOBS).as_posix()
    load(name)

    lines = path.read_text().splitlines()
    comment = lines[: next(at for at, line in enumerate(lines) if not line.startswith("#"))]
    assert len(comment) >= 3
    assert any(f"jobs/{name}" in line and ("flux-batch run" in line or "submit" in line) for line in comment)


@pytest.mark.parametrize("name", ["control.yaml", "demo.yaml", "edit.yaml", "img2img.yaml", "sweep.yaml"])
def test_every_row_of_a_job_on_this_machine_is_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    words = [f"jobs/{name}", "--set", f"output.uri={tmp_path / 'out'}"]

    assert main(["plan", *words]) == 0
    shown = capsys.readouterr().out
    assert "can be rendered" in shown
    assert "InputImage" not in shown
    assert main(["validate", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]["num_failed"] == 0


def test_the_job_in_the_package_is_that_of_the_quick_start() -> None:
    assert load_job(demo_job_path()) == load("demo.yaml")


@pytest.mark.parametrize("path", [*JOBS.glob("*.py"), *JOBS.glob("*.sh")], ids=lambda path: path.name)
def test_every_script_says_how_to_run_it(path: Path) -> None:
    assert f"jobs/{path.name}" in path.read_text()[:1000]


def test_the_day_is_that_of_the_scheduler() -> None:
    config = load("nightly.yaml")

    assert (config.name, config.output.uri) == ("nightly-2026-11-23", "s3://bucket/runs/2026-11-23")


def test_a_sweep_tries_every_setting_with_one_seed(tmp_path: Path) -> None:
    config = load("sweep.yaml", f"output.uri={tmp_path}/out", *SMALL)

    assert render(config, FakePipeline()).num_failed == 0

    rows = metadata(config)
    tried = {(row["prompt"], row["num_inference_steps"], row["embedded_guidance"]) for row in rows}
    assert len(tried) == len(rows) == 2 * 3 * 3
    assert {(row["seed"], row["width"]) for row in rows} == {(7, 32)}


def test_loras_are_compared_at_the_scales_of_the_rows(tmp_path: Path) -> None:
    loras = "[{uri: s3://mine/ink.safetensors, name: a}, {uri: oil.safetensors, name: b}]"
    settings = ["model.uri=demo", f"model.loras={loras}", f"output.uri={tmp_path}/out", *SMALL]
    config, pipeline = load("lora_comparison.yaml", *settings), FakePipeline()

    assert render(config, pipeline).num_failed == 0

    a, b = "s3://mine/ink.safetensors", str(ROOT / "oil.safetensors")
    assert pipeline.lora_calls[1:] == [[], [(a, 0.5)], [(a, 1.0)], [(b, 0.5)], [(b, 1.0)]]
    rows = metadata(config)
    assert [(row["lora"], row["lora_scale"]) for row in rows] == 2 * [
        ("", None),
        *[(name, scale) for name in "ab" for scale in (0.5, 1.0)],
    ]
    assert {row["seed"] for row in rows} == {11}


def test_images_stay_nearer_to_the_one_they_start_from_the_less_is_noised_over(tmp_path: Path) -> None:
    config = load("img2img.yaml", f"output.uri={tmp_path}/out", "sampling.num_inference_steps=6", *DRAWABLE)

    assert run(config, engine=LocalEngine()).num_failed == 0

    with Image.open(JOBS / "prompts/sketch.png") as sketch:
        start = np.asarray(sketch.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS), dtype=float)
    distances: dict[str, list[float]] = {}
    for row in metadata(config):
        assert row["input_image"] == "sketch.png"
        made = np.asarray(Image.open(io.BytesIO((tmp_path / "out" / row["file_name"]).read_bytes())), dtype=float)
        distances.setdefault(row["prompt"], []).append(float(abs(made - start).mean()))
    for near_to_far in distances.values():
        assert len(near_to_far) == 4
        assert near_to_far[0] < near_to_far[-1] / 2


def test_an_edit_changes_what_its_prompt_says_and_lies_beside_its_source(tmp_path: Path) -> None:
    config = load("edit.yaml", f"output.uri={tmp_path}/out", "output.format=files", "prompts.limit=1")

    assert run(config, engine=LocalEngine()).num_failed == 0

    [row] = metadata(config)
    assert (row["prompt"], row["width"], row["height"]) == ("make the star blue", 128, 128)
    path = tmp_path / "out" / row["file_name"]
    after, before = (Image.open(at).convert("RGB") for at in (path, path.with_suffix(".source.png")))
    assert colour_share(before, "red") > 0.05
    assert colour_share(after, "red") < 0.01 < 0.05 < colour_share(after, "blue")
    assert colour_share(after, "white") == pytest.approx(colour_share(before, "white"), abs=0.03)


def test_what_is_drawn_to_edges_lies_within_them(tmp_path: Path) -> None:
    config = load("control.yaml", f"output.uri={tmp_path}/out", "prompts.limit=1")

    assert run(config, engine=LocalEngine()).num_failed == 0

    [row] = metadata(config)
    image = np.asarray(Image.open(tmp_path / "out" / row["file_name"]).convert("RGB"), dtype=float)
    is_red = np.linalg.norm(image - PALETTE["red"], axis=-1) < 60
    edges = np.asarray(Image.open(JOBS / "prompts" / row["control_image"]).convert("L")) > 127
    rows, columns = np.nonzero(edges)
    inside = is_red[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert is_red.sum() == inside.sum() > 500


def test_the_output_of_a_run_can_be_started_from(tmp_path: Path) -> None:
    first = load("demo.yaml", f"output.uri={tmp_path}/first", "output.format=parquet", "prompts.limit=4", *SMALL)
    render(first, FakePipeline())
    pipeline = FakePipeline()
    again = load(
        "img2img.yaml",
        f"prompts.uri={tmp_path}/first/train/",
        "prompts.columns={input_image: image}",
        f"output.uri={tmp_path}/second",
    )

    assert render(again, pipeline).num_failed == 0
    assert len(pipeline.input_images) == 4


def test_recipes_make_the_sets_that_they_name(tmp_path: Path) -> None:
    def rows(name: str, out: str, *settings: str, day: int = 23) -> list[dict[str, Any]]:
        values = [f"output.uri={tmp_path / out}", *settings, *SMALL[2:]]
        config = load_job(JOBS / "recipes" / name, values, datetime(2026, 11, day))
        render(config, FakePipeline())
        return metadata(config)

    classes = rows("classification.yaml", "classes", *SMALL)
    assert set(Counter(row["label"] for row in classes).values()) == {6}
    assert set(Counter(row["place"] for row in classes).values()) == {12}
    pairs = rows("edit_pairs.yaml", "pairs", *SMALL, f"prompts.uri={tmp_path / 'classes' / 'train'}")
    by_key = {row["key"]: row for row in classes}
    assert len(pairs) == 16
    assert all(row["label"] == by_key[row["id"]]["label"] for row in pairs)
    assert all(row["prompt"] == f"make the {row['label']} {row['recoloured']}" for row in pairs)
    assert all(row["recoloured"] != row["colour"] for row in pairs)
    sizes = Counter((row["width"], row["height"]) for row in rows("aspect_ratios.yaml", "ratios"))
    assert sizes == {(128, 128): 12, (192, 128): 6, (128, 192): 6}
    grid = rows("lora_grid.yaml", "grid", *SMALL)
    assert len({(row["prompt"], row["lora_scale"]) for row in grid}) == len(grid) == 16
    nights = [[row["prompt"] for row in rows("nightly.yaml", f"night{day}", *SMALL, day=day)] for day in (23, 24)]
    assert len(nights[0]) == len(nights[1]) == 12 != sum(map(str.__eq__, *nights))


def test_from_bucket_to_bucket_with_what_the_environment_says(
    s3_store: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment: dict[str, Any] = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": s3_store.storage_options["endpoint_url"],
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    prompts = write_prompts(tmp_path / "prompts.parquet", [{"prompt": f"cat {at}"} for at in range(3)])
    Store(s3_store.uri, s3_store.storage_options).write("prompts/cats/one.parquet", prompts)
    config = load("s3.yaml", f"prompts.uri={s3_store.uri}/prompts/cats/", f"output.uri={s3_store.uri}/runs/one", *SMALL)

    assert render(config, FakePipeline()).num_images == 3
    assert Store(f"{s3_store.uri}/runs/one", s3_store.storage_options).exists("_SUCCESS")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
