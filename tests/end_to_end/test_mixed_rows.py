"""Rows of every kind in one job of a tiny model: each is made once, and is the same in any batch."""

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
from helpers.tiny_controlnet import make_net
from helpers.tiny_flux import TinyFlux, make_tiny_repository
from helpers.tiny_ip_adapter import make_tiny_ip_adapter
from helpers.tiny_redux import make_tiny_redux

# A deprecation warning of diffusers about its own class.
IN_DIFFUSERS = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")
SMALLEST = TinyFlux(depth=1, depth_single_blocks=1)


def as_png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


A, B = noise_image(48, 32), noise_image(32, 48).rotate(180)
MASK = Image.new("L", (48, 32))
MASK.paste(255, (8, 8, 30, 20))
FRAMES = [A.convert("P"), A.rotate(90).convert("P")]
# Unusual images of a row, each with the reason of its failure, or "" for success.
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
OF_KONTEXT: list[dict[str, Any]] = [
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
CONTROLS = {"control_image": [A, B]}
OF_NETS: list[dict[str, Any]] = [
    CONTROLS,
    CONTROLS | {"control_image_scale": [0.5, 1.0]},
    CONTROLS | {"input_image": A, "denoising_strength": 0.5},
    CONTROLS | {"input_image": A, "mask_image": MASK},
    CONTROLS | {"image_prompt": [A]},
    CONTROLS | {"image_prompt": [A, B], "image_prompt_scale": [1.0, 0.5], "cfg_scale": 2.0},
]
MASKS = {"empty": Image.new("L", (48, 32)), "full": Image.new("L", (48, 32), 255), "other": Image.new("L", (40, 40))}
NAMES = ("input_image", "mask_image", "reference_image", "image_prompt", "image_prompt_scale", "cfg_scale")
NAMES_OF_NETS = (*(name for name in NAMES if name != "reference_image"), "control_image", "control_image_scale")


def make_rows(count: int, kinds: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Return `count` rows, each with the reason of its failure, or "" for success."""
    plain = kinds[0]
    several = "control_image" if plain else "reference_image"
    rows: list[tuple[dict[str, Any], str]] = []
    for name, (data, reason) in ODD.items():
        for column in ("input_image", several, "image_prompt"):
            is_long = name == "wide" and column == "reference_image"
            value = data if column == "input_image" else [data, A] if column == "control_image" else [data]
            rows.append((plain | {column: value}, "a side of a reference may have at most 8192" if is_long else reason))
    for name, mask in MASKS.items():
        rows.append(
            (
                plain | {"input_image": A, "mask_image": mask},
                "must have the same proportions" if name == "other" else "",
            )
        )
    rows += [(kinds[number % len(kinds)], "") for number in range(count - len(rows))]
    return [({"prompt": f"p{number % 7}", "seed": number, **row}, reason) for number, (row, reason) in enumerate(rows)]


def stored(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as stored in Parquet, with every column."""

    def cell(value: Any) -> Any:
        if isinstance(value, list):
            return [cell(each) for each in value]
        return as_png(value) if isinstance(value, Image.Image) else value

    names = NAMES_OF_NETS if "control_image" in row else NAMES
    return dict.fromkeys((*names, "denoising_strength")) | {name: cell(value) for name, value in row.items()}


def images_of(config: JobConfig) -> dict[int, np.ndarray[Any, Any]]:
    """Return the images of a run by their seeds."""
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
    """An engine that requests a stop after two shards."""

    def run(self, factory: Any, shards: Any, stop: Stop, *rest: Any) -> Any:
        for number, result in enumerate(super().run(factory, shards, stop, *rest), 1):
            yield result
            if number == 2:
                stop.request("a test")


def kontext_with_redux(folder: Path) -> dict[str, Any]:
    model = make_tiny_repository(folder / "flux-kontext", SMALLEST)
    return {"uri": str(model), "redux": {"uri": str(make_tiny_redux(folder / "redux"))}}


def dev_with_nets(folder: Path) -> dict[str, Any]:
    model = make_tiny_repository(folder / "dev", SMALLEST)
    nets = [make_net(folder / "plain", 1, 0), make_net(folder / "union", 1, 1, 4)]
    adapter = make_tiny_ip_adapter(folder / "ip_adapter", SMALLEST)
    return {
        "uri": str(model),
        "controlnets": [{"uri": str(nets[0]), "scale": 0.7}, {"uri": str(nets[1]), "mode": 2, "end": 0.5}],
        "ip_adapter": {"uri": str(adapter)},
    }


@pytest.mark.parametrize(
    ("model_of", "kinds", "count"),
    [
        (kontext_with_redux, OF_KONTEXT, 60),
        pytest.param(kontext_with_redux, OF_KONTEXT, 300, marks=pytest.mark.long),
        pytest.param(dev_with_nets, OF_NETS, 300, marks=[pytest.mark.long, IN_DIFFUSERS]),
    ],
)
def test_rows_of_mixed_kinds(tmp_path: Path, model_of: Any, kinds: list[dict[str, Any]], count: int) -> None:
    model = model_of(tmp_path)
    rows = make_rows(count, kinds)

    def job(folder: Path, some: list[tuple[dict[str, Any], str]], batch_size: int) -> JobConfig:
        return make_job(
            folder,
            [stored(row) for row, _ in some],
            model={"dtype": "float32", **model},
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
