"""Rows of every kind through one job of a tiny Kontext with a Redux: each once, and the same in whatever batch."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.engine.stop import Stop
from flux_batch.errors import Interrupted
from flux_batch.job import run
from flux_batch.report.verify import verify
from flux_batch.storage.store import Store
from helpers.job_files import make_job, metadata
from helpers.tiny_calls import noise_image
from helpers.tiny_flux import TinyFlux, make_tiny_repository
from helpers.tiny_redux import make_tiny_redux

SMALLEST = TinyFlux(depth=1, depth_single_blocks=1)


def as_png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


A, B = noise_image(48, 32), noise_image(32, 48).rotate(180)
MASK = Image.new("L", (48, 32))
MASK.paste(255, (8, 8, 30, 20))
FRAMES = [A.convert("P"), A.rotate(90).convert("P")]
# Images that a row may have, each with what its row comes to.
ODD: dict[str, tuple[bytes, str]] = {
    "1 x 1": (as_png(Image.new("RGB", (1, 1), "red")), ""),
    "CMYK": (as_png(A.convert("CMYK"), format="JPEG"), ""),
    "16 bits": (as_png(Image.fromarray(np.full((32, 48), 40_000, np.uint16))), ""),
    "animated": (as_png(FRAMES[0], format="GIF", save_all=True, append_images=FRAMES[1:]), ""),
    "wide": (as_png(Image.new("L", (20_000, 4))), ""),
    "of no format": (b"GIF89a not really", "not an image in a format that is read"),
    "cut": (as_png(A)[:200], "cannot be decoded"),
    "huge": (as_png(Image.new("1", (9_000, 9_000))), "more than the 64000000 allowed"),
}
KINDS: list[dict[str, Any]] = [
    {},
    {"input_image": A, "denoising_strength": 0.5},
    {"input_image": A, "mask_image": MASK},
    {"reference_image": [A]},
    {"reference_image": [B]},
    {"reference_image": [A, B]},
    {"image_prompt": [A]},
    {"image_prompt": [A, B], "image_prompt_scale": [1.0, 0.5]},
    {"reference_image": [A], "image_prompt": [B], "cfg_scale": 2.0},
]
MASKS = {"empty": Image.new("L", (48, 32)), "full": Image.new("L", (48, 32), 255), "other": Image.new("L", (40, 40))}
NAMES = ("input_image", "mask_image", "reference_image", "image_prompt", "image_prompt_scale", "cfg_scale")


def make_rows(count: int) -> list[tuple[dict[str, Any], str]]:
    """Return so many rows, and what the message of a failed one says."""
    rows: list[tuple[dict[str, Any], str]] = []
    for name, (data, reason) in ODD.items():
        for column in ("input_image", "reference_image", "image_prompt"):
            is_long = name == "wide" and column == "reference_image"
            value = data if column == "input_image" else [data]
            rows.append(({column: value}, "a side of a reference may have 8192" if is_long else reason))
    for name, mask in MASKS.items():
        rows.append(
            ({"input_image": A, "mask_image": mask}, "must have the same proportions" if name == "other" else "")
        )
    rows += [(KINDS[number % len(KINDS)], "") for number in range(count - len(rows))]
    return [({"prompt": f"p{number % 7}", "seed": number, **row}, reason) for number, (row, reason) in enumerate(rows)]


def stored(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as Parquet holds it, with every column."""

    def cell(value: Any) -> Any:
        if isinstance(value, list):
            return [cell(each) for each in value]
        return as_png(value) if isinstance(value, Image.Image) else value

    return dict.fromkeys((*NAMES, "denoising_strength")) | {name: cell(value) for name, value in row.items()}


def images_of(config: JobConfig) -> dict[int, np.ndarray[Any, Any]]:
    """Read the images of a run by their seeds."""
    seeds = {row["key"]: row["seed"] for row in metadata(config)}
    found = {}
    for path in Path(config.output.uri, "train").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    with Image.open(tar.extractfile(member)) as image:  # type: ignore[arg-type]
                        found[seeds[member.name.removesuffix(".png")]] = np.asarray(image).astype(int)
    return found


class Stopping(LocalEngine):
    """An engine that asks for a stop after some shards."""

    def run(self, factory: Any, shards: Any, stop: Stop, *rest: Any) -> Any:
        for number, result in enumerate(super().run(factory, shards, stop, *rest), 1):
            yield result
            if number == 2:
                stop.request("a test")


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.long)])
def test_rows_of_mixed_kinds(tmp_path: Path, count: int) -> None:
    model = make_tiny_repository(tmp_path / "flux-kontext", SMALLEST)
    redux = make_tiny_redux(tmp_path / "redux")
    rows = make_rows(count)

    def job(folder: Path, some: list[tuple[dict[str, Any], str]], batch_size: int) -> JobConfig:
        return make_job(
            folder,
            [stored(row) for row, _ in some],
            model={"uri": str(model), "dtype": "float32", "redux": {"uri": str(redux)}},
            output={"shard_size": count // 5},
            sampling={
                **{"width": 48, "height": 32, "num_inference_steps": 2, "t5_sequence_length": 8},
                **{"resize_references": False, "size_from_reference": False},
            },
            workers={"batch_size": batch_size, "num_cpus": 1},
            failures={"max_ratio": 1.0},
        )

    config = job(tmp_path / "run", rows, 8)
    stop = Stop()
    with pytest.raises(Interrupted):
        run(config, engine=Stopping(), stop=stop)
    report = run(config, engine=LocalEngine())

    found = metadata(config)
    assert [row["seed"] for row in found] == list(range(count))
    assert Counter(row["status"] for row in found)["failed"] == sum(bool(reason) for _, reason in rows)
    for row, (_, reason) in zip(found, rows, strict=True):
        assert (row["status"] == "failed") == bool(reason), (row["seed"], row["error_message"])
        assert reason in (row["error_message"] or "")
    assert report.num_images == count
    assert 0 < report.num_new_images < count
    assert verify(Store(config.output.uri), quick=True).problems == []

    alone = job(tmp_path / "alone", rows[::4], 1)
    run(alone, engine=LocalEngine())
    together, single = images_of(config), images_of(alone)
    assert len(single) > count // 6
    assert all(np.abs(together[seed] - image).max() <= 1 for seed, image in single.items())
    assert len({image.tobytes() for image in together.values()}) == len(together)
