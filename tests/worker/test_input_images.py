"""Rows that start from an image: reading it, and failures of bad images."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import flux_batch.worker.worker as worker_module
from flux_batch.config.schema import JobConfig
from flux_batch.errors import Stopped
from flux_batch.images import read_provenance
from flux_batch.prompts.input_images import load_images
from flux_batch.records import RowImages
from flux_batch.storage.store import Store
from helpers.fakes import FakePipeline, fake_image
from helpers.waiting import PATIENCE_S, wait_until
from helpers.worker_runs import FORMATS, files_of, images, make_job, metadata, open_worker, pixels_of, render


def colour(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def started_from(image: Image.Image, prompt: str, seed: int, **others: Any) -> Any:
    """Return the expected image of a row that starts from `image`, in a job of `make_job`."""
    start = image.resize((64, 48), Image.Resampling.LANCZOS)
    common = {"width": 64, "height": 48, "num_inference_steps": 3, "denoising_strength": 0.6}
    return fake_image(prompt, seed=seed, input_image=start, **common | others)


def make_image_job(tmp_path: Path, rows: Sequence[dict[str, Any]], **sections: Any) -> JobConfig:
    sampling = {"denoising_strength": 0.6} | sections.pop("sampling", {})
    base = {"width": 64, "height": 48, "num_inference_steps": 3}
    return make_job(tmp_path, rows, sampling=base | sampling, **sections)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("kind", ["path", "bytes", "struct", "struct of a path"])
def test_rows_start_from_their_own_images(tmp_path: Path, kind: str, layout: str) -> None:
    cells: list[Any] = []
    for number in range(5):
        name, data = f"images/{number}.png", as_png(colour(number))
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
        structs = {"struct": {"bytes": data, "path": "x.png"}, "struct of a path": {"bytes": None, "path": name}}
        cells.append({"path": name, "bytes": data, **structs}[kind])
    rows = [{"prompt": f"p{number}", "input_image": cell} for number, cell in enumerate(cells)]
    config = make_image_job(tmp_path, rows, output={"format": layout})

    render(config)

    found, made = metadata(config), images(config)
    for number, row in enumerate(found):
        expected = started_from(colour(number), row["prompt"], row["seed"])
        assert np.array_equal(pixels_of(made[row["key"]]), expected), row["error_message"]
        assert row["denoising_strength"] == 0.6
        name = f"images/{number}.png"
        if "bytes" in kind or kind == "struct":
            name = f"sha256:{hashlib.sha256(as_png(colour(number))).hexdigest()}"
        assert row["input_image"] == name
        assert read_provenance(made[row["key"]])["input_image"] == name


def test_bad_input_images_are_recorded_and_cost_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(as_png(colour(0)))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(as_png(colour(0))[:500])
    outside = tmp_path.parent / f"{tmp_path.name}-outside.png"
    outside.write_bytes(as_png(colour(0)))
    (tmp_path / "link.png").symlink_to(outside)
    reasons = {
        "good.png": "",
        "none.png": "there is no file",
        "text.png": "not an image",
        "cut.png": "cannot be decoded",
        f"../{outside.name}": "leads out of",
        "link.png": "is a link that leads out of",
        str(outside): "only under prompts.input_image_root",
        "http://example.com/a.png": "only if prompts.allow_http",
        "": "denoising_strength = 0.6: needs an input_image",
        "./good.png": "",
    }
    config = make_image_job(tmp_path, [{"prompt": "p", "input_image": name} for name in reasons])

    render(config)

    rows = metadata(config)
    assert len(rows) == len(reasons)
    for row, (name, reason) in zip(rows, reasons.items(), strict=True):
        assert row["status"] == ("failed" if reason else "success"), name
        assert reason in (row["error_message"] or ""), name
        if reason:
            assert row["error_type"] == "RowError"
            assert "(" not in row["error_message"]  # the message is for users and names no place in the code
    assert len(images(config)) == 2


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_odd_images_and_masks_cost_their_row_at_most(tmp_path: Path) -> None:
    photo, grey = colour(3), colour(4).convert("L")
    hole = Image.new("RGBA", (40, 30), "white")
    hole.paste((0, 0, 0, 0), (0, 0, 20, 30))
    frames = encoded(photo, "GIF", save_all=True, append_images=[colour(5)])
    odd: dict[str, tuple[bytes, bytes, str]] = {
        "1 x 1": (as_png(Image.new("RGB", (1, 1))), as_png(Image.new("L", (1, 1), 255)), ""),
        "CMYK": (encoded(photo.convert("CMYK"), "JPEG"), as_png(grey), ""),
        "16 bits": (as_png(Image.new("I;16", (40, 30), 40000)), as_png(Image.new("I;16", (40, 30), 40000)), ""),
        "animated": (frames, frames, ""),
        "wide": (as_png(Image.new("RGB", (20_000, 3))), as_png(Image.new("1", (20_000, 3), 1)), ""),
        "half as large": (as_png(photo), as_png(Image.new("1", (20, 15), 1)), ""),
        "of another shape": (as_png(photo), as_png(Image.new("1", (30, 30), 1)), "30 x 30 pixels, its image 40 x 30"),
        "empty": (as_png(photo), as_png(Image.new("1", (40, 30))), ""),
        "full": (as_png(photo), as_png(Image.new("1", (40, 30), 1)), ""),
        "painted away": (as_png(photo), as_png(hole), ""),
        "text": (as_png(photo), b"no image", "not an image in a format that is read"),
    }
    rows = [{"prompt": name, "input_image": image, "mask_image": mask} for name, (image, mask, _) in odd.items()]
    config = make_image_job(tmp_path, rows, workers={"batch_size": 1})
    pipeline = FakePipeline()

    render(config, pipeline)

    found = metadata(config)
    for row, (name, (_, mask, reason)) in zip(found, odd.items(), strict=True):
        assert row["status"] == ("failed" if reason else "success"), (name, row["error_message"])
        assert reason in (row["error_message"] or "")
        assert row["mask_image"] == f"sha256:{hashlib.sha256(mask).hexdigest()}"
        if reason:
            assert row["error_message"].startswith(f"{row['id']}: ")
            assert f"mask_image sha256:{hashlib.sha256(mask).hexdigest()}: " in row["error_message"]
    calls = zip(pipeline.calls, pipeline.conditions, strict=True)
    made = {prompts[0]: np.asarray(given["mask_image"][0]) for prompts, given in calls}
    assert made["painted away"].shape == (48, 64)
    assert (made["painted away"][:, :30] > 127).all()
    assert (made["painted away"][:, 34:] < 128).all()
    assert (made["16 bits"] > 127).all()
    assert not made["empty"].any()


def test_control_images_and_image_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(as_png(colour(1)))
    rows = [
        {"prompt": "plain", "control_image": None, "control_image_scale": None, "image_prompt": None},
        {"prompt": "one", "control_image": ["a.png"], "control_image_scale": 0.5, "image_prompt": None},
        {"prompt": "gone", "control_image": ["a.png", "b.png"], "image_prompt": None},
        {"prompt": "seen", "control_image": None, "image_prompt": "a.png"},
    ]
    nets = [{"uri": "net", "scale": 0.7, "end": 0.8}, {"uri": "union", "mode": 2}]
    config = make_job(tmp_path, rows, model={"uri": "fake", "controlnets": nets})
    pipeline = FakePipeline()

    render(config, pipeline)

    plain, one, gone, seen = metadata(config)
    assert (plain["status"], plain["control_image"]) == ("success", None)
    assert (one["status"], one["control_image"], one["control_image_scale"]) == ("success", "a.png", "0.5")
    assert "control_image b.png: there is no file" in gone["error_message"]
    assert (seen["image_prompt"], seen["image_prompt_scale"]) == ("a.png", "1")
    (sizes,) = (
        [image.size for image in each] for given in pipeline.conditions for each in given.get("control_image", [])
    )
    assert sizes == [(64, 48)]
    settings = {"controlnet_conditioning_scale": [0.7, 1.0], "control_guidance_end": [0.8, 1.0]}
    settings |= {"control_mode": [None, 2], "control_image_scale": [[0.5]]}
    assert [options for options in pipeline.options if options] == [settings]


def test_rows_take_the_size_of_their_reference_images(tmp_path: Path) -> None:
    """Images with references of different sizes are made in separate batches."""
    for name, size in {"wide": (100, 40), "tall": (40, 100), "huge": (9000, 20)}.items():
        (tmp_path / f"{name}.png").write_bytes(as_png(Image.new("RGB", size)))
    names = ["wide.png", "tall.png", "wide.png", "tall.png wide.png", "huge.png", "wide.png"]
    rows: list[dict[str, Any]] = [
        {"prompt": f"p{at}", "reference_image": name.split(), "width": None} for at, name in enumerate(names)
    ]
    rows[5]["width"] = 32
    config = make_job(tmp_path, rows, sampling={"resize_references": False, "num_inference_steps": 2})
    pipeline = FakePipeline()

    render(config, pipeline)

    found = metadata(config)
    sizes = [(row["width"], row["height"]) for row in found if row["status"] == "success"]
    assert sizes == [(96, 32), (32, 96), (96, 32), (32, 96), (32, 48)]
    assert [row["reference_image"] for row in found][2:4] == ["wide.png", "tall.png, wide.png"]
    assert (
        "reference_image huge.png: 9000 x 20 pixels: a side of a reference may have at most 8192"
        in found[4]["error_message"]
    )
    assert [calls for calls in pipeline.calls if len(calls) > 1] == [["p0", "p2"]]
    assert all(given == {"resize_references": False} for given in pipeline.options)
    made = images(config)
    assert all(pixels_of(made[row["key"]]).shape[:2] == (row["height"], row["width"]) for row in found if row["sha256"])


def test_a_cell_that_holds_no_image_fails_its_row(tmp_path: Path) -> None:
    config = make_image_job(tmp_path, [{"prompt": "p", "input_image": 5}])

    render(config)

    assert "holds int: must be a path, an address, bytes" in metadata(config)[0]["error_message"]


def test_a_job_of_one_image_reads_it_once_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.png").write_bytes(as_png(colour(7)))
    (tmp_path / "own.png").write_bytes(as_png(colour(8)))
    read: list[dict[str, Any]] = []
    monkeypatch.setattr(
        worker_module,
        "load_images",
        lambda images, *rest, **how: [read.append(images.names), load_images(images, *rest, **how)][1],
    )
    rows = [{"prompt": f"p{number}", "input_image": None} for number in range(7)]
    rows[5] |= {"input_image": "own.png"}
    sampling = {"input_image": str(tmp_path / "job.png"), "num_images_per_prompt": 2}
    config = make_image_job(tmp_path, rows, sampling=sampling)

    render(config)

    made = images(config)
    for row in metadata(config):
        start = colour(8 if row["prompt"] == "p5" else 7)
        assert np.array_equal(pixels_of(made[row["key"]]), started_from(start, row["prompt"], row["seed"]))
    assert Counter(names["input_image"] for names in read) == {str(tmp_path / "job.png"): 2, "own.png": 1}


@pytest.mark.parametrize("end", ["a stop", "the commit of another worker"])
def test_nobody_waits_for_images_that_were_read_ahead_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """The image comes from a server that never answers."""
    (tmp_path / "images").mkdir()
    for number in range(8):
        (tmp_path / f"images/{number}.png").write_bytes(as_png(colour(number)))
    rows = [{"prompt": f"p{number}", "input_image": f"images/{number}.png"} for number in range(8)]
    config = make_image_job(tmp_path, rows, output={"shard_size": 8}, workers={"batch_size": 2})
    answered = threading.Event()
    silent = {"images/4.png", "images/5.png"} if end == "a stop" else set()
    asked: set[str] = set()
    had: list[str] = []

    def read(images: RowImages, *rest: Any, **how: Any) -> Any:
        name = images.names["input_image"]
        if name in silent - asked:
            asked.add(name)
            answered.wait(PATIENCE_S)
            had.append(name)
        return load_images(images, *rest, **how)

    class Ending(FakePipeline):
        def __call__(self, *args: Any, **others: Any) -> Any:
            if self.num_calls == 1 and end == "a stop":
                wait_until(lambda: asked == silent)
                worker.stop()
            elif self.num_calls == 1:
                wait_until(lambda: len(files_of(config, "_run/staging")) == 1)
                other.make(plan.shards[0]).finish()  # noticed after the next batch
                silent.update({"images/6.png", "images/7.png"})
            elif self.num_calls == 2:
                wait_until(lambda: asked == silent)
            return super().__call__(*args, **others)

    monkeypatch.setattr(worker_module, "load_images", read)
    worker, plan = open_worker(config, Ending())
    other, _ = open_worker(config)
    try:
        if end == "a stop":
            with pytest.raises(Stopped, match="stopped with 4 of 8 images"):
                worker.make(plan.shards[0])
        else:
            worker.make(plan.shards[0]).finish()
        assert had == []
    finally:
        answered.set()


def test_rows_without_an_input_image_are_made_from_noise(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(as_png(colour(1)))
    rows = [
        {"prompt": "noise", "input_image": None, "denoising_strength": None},
        {"prompt": "half", "input_image": "a.png", "denoising_strength": 0.5},
        {"prompt": "all", "input_image": "a.png", "denoising_strength": 1.0},
        {"prompt": "none", "input_image": "a.png", "denoising_strength": 0.0},
    ]
    config = make_job(tmp_path, rows)
    pipeline = FakePipeline()

    render(config, pipeline)

    noise, half, whole, none = metadata(config)
    assert (noise["input_image"], noise["denoising_strength"]) == (None, 1.0)
    assert (half["input_image"], half["denoising_strength"]) == ("a.png", 0.5)
    assert (whole["input_image"], whole["denoising_strength"]) == ("a.png", 1.0)
    assert "denoising_strength = 0.0: must be more than 0 and at most 1" in none["error_message"]
    assert pipeline.options == [{}, {"denoising_strength": 0.5}, {}]


@pytest.mark.parametrize("layout", FORMATS)
def test_runs_with_input_images_leave_the_same_bytes(tmp_path: Path, layout: str) -> None:
    (tmp_path / "a.png").write_bytes(as_png(colour(1)))
    rows: list[dict[str, Any]] = [{"prompt": f"p{number}", "input_image": "a.png"} for number in range(6)]
    rows[1]["input_image"] = "none.png"
    found = []
    for number in range(2):
        config = make_image_job(tmp_path, rows, output={"uri": str(tmp_path / f"out{number}"), "format": layout})
        render(config)
        if number:
            Path(config.output.uri, "_run/commits/00000.json").unlink()
            render(config)
        found.append(files_of(config, "train", "metadata", "_run/failed"))

    assert found[0] == found[1]


@pytest.mark.s3
def test_prompts_in_a_bucket_start_from_images_beside_them(tmp_path: Path, s3_store: Any) -> None:
    store = Store(s3_store.uri, s3_store.storage_options)
    store.write("set/sub/a.png", as_png(colour(1)))
    store.write("b.png", as_png(colour(2)))
    names = ["a.png", "../sub/a.png", f"{s3_store.uri}/b.png", "../../b.png", "none.png"]
    lines = [json.dumps({"prompt": "p", "input_image": name}) for name in names]
    store.write("set/sub/p.jsonl", "\n".join(lines).encode())
    prompts = {"uri": f"{s3_store.uri}/set", "storage_options": s3_store.storage_options}
    config = make_image_job(tmp_path, [{"prompt": "unused"}], prompts=prompts)

    render(config)

    rows, made = metadata(config), images(config)
    assert [row["status"] for row in rows] == ["success"] * 3 + ["failed"] * 2
    for row, number in zip(rows, [1, 1, 2], strict=False):
        assert np.array_equal(pixels_of(made[row["key"]]), started_from(colour(number), "p", row["seed"]))
    assert "leads out of" in rows[3]["error_message"]
    assert "not found" in rows[4]["error_message"]


def test_a_job_makes_the_images_of_the_same_calls_of_the_pipeline(tmp_path: Path) -> None:
    """A job with a tiny model, in batches: each image is that of the same call alone."""
    from flux_batch import FluxImagePipeline
    from helpers.tiny_flux import TinyFlux, make_tiny_repository

    folder = make_tiny_repository(tmp_path / "model", TinyFlux(depth=1, depth_single_blocks=1))
    pipe = FluxImagePipeline.from_pretrained(folder, torch_dtype="float32", device="cpu")
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "input_image": as_png(colour(1)), "sigma_shift": None, "cfg_scale": None},
        {"prompt": "b", "input_image": as_png(colour(2)), "sigma_shift": None, "cfg_scale": 2.5},
        {"prompt": "c", "input_image": as_png(colour(3)), "sigma_shift": None, "cfg_scale": None},
        {"prompt": "d", "input_image": as_png(colour(4)), "sigma_shift": 3.0, "cfg_scale": 0.5},
    ]
    sampling = {"t5_sequence_length": 16, "negative_prompt": "blur", "tiled": True, "tile_size": 16, "tile_stride": 8}
    config = make_image_job(tmp_path, rows, sampling=sampling)

    render(config, pipe)

    made = images(config)
    for number, row in enumerate(metadata(config)):
        alone = pipe(
            row["prompt"],
            negative_prompt="blur",
            width=64,
            height=48,
            num_inference_steps=3,
            cfg_scale=rows[number]["cfg_scale"] or 1.0,
            sigma_shift=rows[number]["sigma_shift"],
            input_image=colour(number + 1),
            denoising_strength=0.6,
            seed=row["seed"],
            output_type="np",
            **{name: value for name, value in sampling.items() if name != "negative_prompt"},
        )
        difference = np.abs(pixels_of(made[row["key"]]).astype(int) - alone.astype(int))
        assert difference.max() <= 1, row["error_message"]
        assert row["tile_size"] == 16
