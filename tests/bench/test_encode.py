import io
import itertools
from functools import partial

import numpy as np
import pytest
from PIL import Image

from flux_batch.bench import encode as module
from flux_batch.bench.encode import bench_encode, encoders, format_encode, noisy_image, smooth_image
from flux_batch.bench.figures import alternated


def test_every_level_and_format_is_measured_on_both_images(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0.0, 0.25)
    monkeypatch.setattr(module, "alternated", partial(alternated, clock=lambda: next(now)))
    figures = bench_encode(64, 2)

    names = [result["encoder"] for result in figures["results"] if result["image"] == "smooth"]
    assert names[:10] == [f"Pillow PNG {level}" for level in range(10)]
    assert names[-3:] == ["Pillow JPEG 95", "Pillow WebP 95", "Pillow WebP lossless"]
    assert len(figures["results"]) == 2 * len(names)
    for image, make in (("smooth", smooth_image), ("noise-like", noisy_image)):
        sizes = {result["encoder"]: result["bytes"] for result in figures["results"] if result["image"] == image}
        assert sizes == {name: len(encode(make(64))) for name, encode in encoders()}
    assert {result["milliseconds"]["median"] for result in figures["results"]} == {250.0}
    assert {result["megabytes_of_pixels_per_second"] for result in figures["results"]} == {3 * 64 * 64 / 0.25 / 1e6}
    assert "noise-like, Pillow PNG 9" in format_encode(figures)


def test_noise_compresses_badly() -> None:
    sizes = {
        result["image"]: result["bytes"] for result in bench_encode(64, 1)["results"] if "PNG 6" in result["encoder"]
    }

    assert sizes["noise-like"] > 1.5 * sizes["smooth"]


@pytest.mark.parametrize("make", [smooth_image, noisy_image])
def test_lossless_encoders_give_the_image_back(make: object) -> None:
    assert callable(make)
    pixels = make(32)

    for name, encode in encoders():
        if "PNG" in name or "lossless" in name:
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(pixels)))), pixels), name
