"""`reproduce`: one image again from its metadata alone, and errors where that is impossible."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flux_batch.cli import main
from flux_batch.config.schema import JobConfig, ModelConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import JobError
from flux_batch.images import decode
from flux_batch.job import reproduce, run
from flux_batch.records import image_seed, retry_seed
from flux_batch.storage.store import Store
from flux_batch.worker.recorder import recorded_task, recorded_tiles
from helpers.fakes import FakePipeline, make_fake_pipeline
from helpers.job_files import make_job, metadata


def make_run(folder: Path, rows: list[dict[str, Any]], **sections: Any) -> JobConfig:
    config = make_job(folder, rows, failures={"max_ratio": 1}, **sections)
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    return config


def make_rich_run(folder: Path) -> JobConfig:
    """Make a run whose images differ in all settings of rows, jobs and retries."""
    for name, size in (("start", (20, 30)), ("mask", (40, 60)), ("wide", (48, 32))):
        Image.effect_noise(size, 60).save(folder / f"{name}.png")
    start, mask, wide = (str(folder / f"{name}.png") for name in ("start", "mask", "wide"))
    rows: list[dict[str, Any]] = [
        {"prompt": "plain", "id": "plain"},
        {"prompt": "set", "width": 32, "negative_prompt": "dull", "cfg_scale": 2.0, "seed": 5},
        {"prompt": "painted", "input_image": start, "mask_image": mask, "denoising_strength": 0.6},
        {"prompt": "edited", "reference_image": [wide, start], "width": None},
        {"prompt": "styled", "lora": "style", "lora_scale": 0.5},
        {"prompt": "bare", "lora": "none"},
        {"prompt": "large [oom whole]"},
        {"prompt": "relative", "input_image": "start.png"},
        {"prompt": "broken [raise]"},
    ]
    columns = {name for row in rows for name in row}
    return make_run(
        folder,
        [{name: row.get(name) for name in columns} for row in rows],
        prompts={"input_image_root": str(folder)},
        output={"format": "files", "image": {"type": "jpeg"}},
        model={"loras": [{"uri": f"/{name}.safetensors", "name": name, "scale": 2.0} for name in ("style", "detail")]},
        sampling={"num_images_per_prompt": 2, "paste_back": False, "resize_references": False},
        quality={"score": "helpers.annotators:FirstRed", "at_least": 0.5, "max_tries": 2, "keep": "best"},
    )


def test_an_image_is_made_again_from_its_metadata_alone(tmp_path: Path) -> None:
    config = make_rich_run(tmp_path)
    Path(config.prompts.uri[0]).unlink()
    rows = {row["key"]: row for row in metadata(config)}
    assert {(row["width"], row["height"]) for row in rows.values()} == {(16, 16), (32, 16), (48, 32)}
    assert {row["tile_size"] for row in rows.values()} == {None, 64}
    assert {row["lora"] for row in rows.values()} == {"style (2), detail (2)", "style", ""}
    second = [retry_seed(image_seed(0, row["id"], row["image_index"]), 1) for row in rows.values()]
    assert any(row["seed"] == seed for row, seed in zip(rows.values(), second, strict=True)), "no second try was kept"
    made = []
    for key, row in rows.items():
        if row["status"] == "success" and row["prompt"] != "relative":
            result = reproduce(Store(config.output.uri), key, make_pipeline=make_fake_pipeline)
            assert (result.is_same_file, result.differs, result.text) == (True, {}, f"{key}: equal, byte for byte")
            made.append(row["prompt"])
    assert len(made) == 2 * 7
    with pytest.raises(JobError, match=r"its input_image start\.png is relative to its prompts file"):
        reproduce(Store(config.output.uri), "000010003", make_pipeline=make_fake_pipeline)


class Brighter(FakePipeline):
    """A pipeline as on another device: every pixel value is one higher."""

    kernels = replace(FakePipeline.kernels, device="another", torch="3.0")

    def __call__(self, *args: Any, **others: Any) -> Any:
        return [np.minimum(image, 254) + 1 for image in super().__call__(*args, **others)]


def brighter(model: ModelConfig) -> FakePipeline:
    assert (model.uri, model.dtype, model.storage_options) == ("/elsewhere", "float32", {})
    return Brighter()


def test_it_says_how_far_an_image_is_and_what_differs(tmp_path: Path) -> None:
    config = make_run(tmp_path, [{"prompt": "one"}], model={"storage_options": {"key": "hush"}})
    store = Store(config.output.uri)
    report = json.loads(store.read("_run/report.json"))
    store.write("_run/report.json", json.dumps(report | {"versions": {**report["versions"], "ray": "1.0"}}).encode())
    result = reproduce(store, "000000000", "/elsewhere", make_pipeline=brighter)
    assert result.difference is not None
    assert (result.is_equal, result.is_same_file, result.difference.max_levels) == (False, False, 1)
    assert set(result.differs) == {"ray", "device", "torch"}  # the fake pipeline has no model with a revision
    first, second, *lines = result.text.splitlines()
    assert first.startswith("000000000: differs by at most 1 of 255 levels, on average by ")
    assert second.startswith("it was made alone")
    assert "device         cpu AVX2 in the run, another here" in lines


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("000000001", r"has no image, since it failed: RuntimeError: asked to fail"),
        ("000010000", "is not there yet: shard 00001 is not committed"),
        ("000000000", "its file is missing or damaged"),
        ("000000002", "its file is missing or damaged"),
        ("000020000", r"metadata/00002\.parquet is damaged"),
        *((key, "has no image") for key in ("000000009", "000000000_1", "000030000", "x", "")),
    ],
)
def test_a_key_without_an_image_is_a_sentence(tmp_path: Path, key: str, sentence: str) -> None:
    rows = [{"prompt": text} for text in ("a", "b [raise]", *"cdefghi")]
    make_run(tmp_path, rows, output={"format": "files"})
    (tmp_path / "out/_run/commits/00001.json").unlink()
    (tmp_path / "out/metadata/00002.parquet").write_bytes(b"no table")
    (tmp_path / "out/train/00000/000000000.png").write_bytes(b"no image")
    (tmp_path / "out/train/00000/000000002.png").unlink()
    with pytest.raises(JobError, match=sentence):
        reproduce(Store(str(tmp_path / "out")), key, make_pipeline=make_fake_pipeline)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mask_image": "sha256:ab"}, "its mask_image was inside its row, and the metadata has only its hash"),
        ({"reference_image": "/a.png, b.png"}, "its reference_image b.png is relative"),
        ({"input_image": "/none.png"}, "k: input_image /none.png: there is no file /none.png"),
        ({"lora": "mine.safetensors", "lora_scale": 1.0}, "its lora mine.safetensors is relative"),
    ],
)
def test_what_the_metadata_does_not_say_is_named(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    row = {"key": "k", "id": "i", "prompt": "p", "seed": 1, "width": 16, "height": 16, "embedded_guidance": 3.5}
    # The row was written by an older version.
    assert recorded_task(row, make_job(tmp_path)).request.sampling.num_inference_steps == 28
    with pytest.raises(JobError, match=sentence):
        recorded_task(row | changes, make_job(tmp_path))


@pytest.mark.parametrize(
    ("size", "sampling", "tiles"),
    [
        (None, {}, None),
        (64, {"tile_size": 64, "tile_stride": 16}, (64, 32)),
        (64, {"tiled": True, "tile_size": 64, "tile_stride": 16}, (64, 16)),
        (64, {"tiled": True}, (64, 32)),
        (128, {"tiled": True}, (128, 64)),
    ],
)
def test_tiles_are_those_of_the_job_or_small_ones(
    tmp_path: Path, size: int | None, sampling: dict[str, Any], tiles: tuple[int, int] | None
) -> None:
    assert recorded_tiles({"tile_size": size}, make_job(tmp_path, sampling=sampling).sampling) == tiles


def test_the_new_image_can_be_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(tmp_path, [{"prompt": "one"}])
    monkeypatch.setattr("flux_batch.job.load_pipeline", lambda model, num_gpus: FakePipeline())
    capsys.readouterr()
    command = ["reproduce", config.output.uri, "000000000"]
    assert main([*command, "--save", str(tmp_path / "no/again.png")]) == 2
    assert "no/again.png: there is no such folder" in capsys.readouterr().err
    assert main([*command, "--save", str(tmp_path / "again.png"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["is_equal"]
    assert said["difference"] == {"max_levels": 0, "mean_levels": 0.0, "psnr_db": None}
    assert decode((tmp_path / "again.png").read_bytes()).shape == (16, 16, 3)
