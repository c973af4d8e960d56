"""How fast images become files, by format and level: what one CPU has to keep up with."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from flux_batch.bench.figures import alternated, number, table
from flux_batch.images import Pixels

QUALITY = 95
SEED = 6


def bench_encode(side: int, repeats: int) -> dict[str, Any]:
    """Encode two images in every format, one thread each; OpenCV's too, if it is installed."""
    results = []
    for content, pixels in (("smooth", smooth_image(side)), ("noise-like", noisy_image(side))):
        for name, encode in encoders():
            size = len(encode(pixels))
            seconds = alternated({name: partial(again, encode, pixels)}, repeats, warm_ups=0)
            results.append(
                {
                    "image": content,
                    "encoder": name,
                    "bytes": size,
                    "milliseconds": seconds[name].scaled(1000).to_json(),
                    "megabytes_of_pixels_per_second": pixels.nbytes / seconds[name].median / 1e6,
                }
            )
    return {"benchmark": "encode", "side": side, "repeats": repeats, "opencv": has_opencv(), "results": results}


def again(encode: Callable[[Pixels], bytes], pixels: Pixels, repeat: int) -> bytes:
    """Encode once more."""
    return encode(pixels)


def smooth_image(side: int) -> Pixels:
    """Return an image of gradients: uint8 (side, side, 3)."""
    rows, columns = np.mgrid[0:side, 0:side] / side
    channels = [np.sin(6 * rows + 3 * columns), np.cos(4 * columns), np.sin(5 * rows * columns)]
    return to_uint8(np.stack(channels, axis=-1))


def noisy_image(side: int) -> Pixels:
    """Return the same with noise of all scales, as photographs have: amplitude 1 over frequency."""
    spectrum = np.fft.rfft2(np.random.default_rng(SEED).standard_normal((3, side, side)))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1.0
    noise = np.fft.irfft2(spectrum / frequency, s=(side, side))
    return to_uint8((noise / np.abs(noise).max()).transpose(1, 2, 0))


def to_uint8(values: Any) -> Pixels:
    """Return values in [-1, 1] as uint8."""
    pixels: Pixels = np.ascontiguousarray(((values + 1) * 127.5).round().astype(np.uint8))
    return pixels


def encoders() -> Iterator[tuple[str, Callable[[Pixels], bytes]]]:
    """Yield what can be compared here, by name."""
    for level in range(10):
        yield f"Pillow PNG {level}", partial(pillow, kind="PNG", compress_level=level)
    if has_opencv():
        for opencv_level in (None, 1, 3, 6):
            yield f"OpenCV PNG {opencv_level or ''}".rstrip(), partial(opencv_png, level=opencv_level)
    yield f"Pillow JPEG {QUALITY}", partial(pillow, kind="JPEG", quality=QUALITY, subsampling=0)
    yield f"Pillow WebP {QUALITY}", partial(pillow, kind="WEBP", quality=QUALITY)
    yield "Pillow WebP lossless", partial(pillow, kind="WEBP", lossless=True, method=0)


def opencv_png(pixels: Pixels, level: int | None) -> bytes:
    """Return the PNG file that OpenCV makes of an image, at its own level if none is named."""
    import cv2

    flags = [] if level is None else [cv2.IMWRITE_PNG_COMPRESSION, level]
    return bytes(cv2.imencode(".png", pixels[:, :, ::-1], flags)[1])


def pillow(pixels: Pixels, kind: str, **options: Any) -> bytes:
    """Return the file that Pillow makes of an image."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def has_opencv() -> bool:
    """Tell whether OpenCV can be imported."""
    try:
        import cv2  # noqa: F401
    except ImportError:
        return False
    return True


def format_encode(figures: dict[str, Any]) -> str:
    """Lay the figures out for people."""
    rows = [["image, encoder", "ms", "least", "most", "KB", "MB/s of pixels"]]
    for result in figures["results"]:
        ms = result["milliseconds"]
        rows.append(
            [
                f"{result['image']}, {result['encoder']}",
                *(number(ms[key]) for key in ("median", "least", "most")),
                number(result["bytes"] / 1e3),
                number(result["megabytes_of_pixels_per_second"]),
            ]
        )
    missing = "" if figures["opencv"] else "\nOpenCV is not installed: not measured"
    return f"{figures['side']} x {figures['side']} RGB, medians of {figures['repeats']}\n{table(rows)}{missing}"
