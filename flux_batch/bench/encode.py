"""The benchmark of encoding images on one CPU, by format and level."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from flux_batch.bench.figures import alternated, number, table
from flux_batch.images import Pixels

_QUALITY = 95
_SEED = 6


def bench_encode(side: int, repeats: int) -> dict[str, Any]:
    """Measure two images in every format on one thread; OpenCV's formats too, if it is installed."""
    results = []
    for content, pixels in (("smooth", smooth_image(side)), ("noise-like", noisy_image(side))):
        for name, encode in encoders():
            size = len(encode(pixels))
            seconds = alternated({name: partial(_encode_again, encode, pixels)}, repeats, warm_ups=0)
            results.append(
                {
                    "image": content,
                    "encoder": name,
                    "bytes": size,
                    "milliseconds": seconds[name].scaled(1000).to_json(),
                    "megabytes_of_pixels_per_second": pixels.nbytes / seconds[name].median / 1e6,
                }
            )
    return {"benchmark": "encode", "side": side, "repeats": repeats, "opencv": _has_opencv(), "results": results}


def _encode_again(encode: Callable[[Pixels], bytes], pixels: Pixels, repeat: int) -> bytes:
    """Encode an image; the number of the repeat is ignored."""
    return encode(pixels)


def smooth_image(side: int) -> Pixels:
    """Return an image of gradients: uint8 (side, side, 3)."""
    rows, columns = np.mgrid[0:side, 0:side] / side
    channels = [np.sin(6 * rows + 3 * columns), np.cos(4 * columns), np.sin(5 * rows * columns)]
    return _to_uint8(np.stack(channels, axis=-1))


def noisy_image(side: int) -> Pixels:
    """Return an image of noise at all scales, as in photographs: amplitude 1 / frequency."""
    spectrum = np.fft.rfft2(np.random.default_rng(_SEED).standard_normal((3, side, side)))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1.0
    noise = np.fft.irfft2(spectrum / frequency, s=(side, side))
    return _to_uint8((noise / np.abs(noise).max()).transpose(1, 2, 0))


def _to_uint8(values: Any) -> Pixels:
    """Return values in [-1, 1] as uint8 pixels."""
    pixels: Pixels = np.ascontiguousarray(((values + 1) * 127.5).round().astype(np.uint8))
    return pixels


def encoders() -> Iterator[tuple[str, Callable[[Pixels], bytes]]]:
    """Yield the name and the function of each encoder that is installed."""
    for level in range(10):
        yield f"Pillow PNG {level}", partial(_pillow, image_format="PNG", compress_level=level)
    if _has_opencv():
        for opencv_level in (None, 1, 3, 6):
            yield f"OpenCV PNG {opencv_level or ''}".rstrip(), partial(_opencv_png, level=opencv_level)
    yield f"Pillow JPEG {_QUALITY}", partial(_pillow, image_format="JPEG", quality=_QUALITY, subsampling=0)
    yield f"Pillow WebP {_QUALITY}", partial(_pillow, image_format="WEBP", quality=_QUALITY)
    yield "Pillow WebP lossless", partial(_pillow, image_format="WEBP", lossless=True, method=0)


def _opencv_png(pixels: Pixels, level: int | None) -> bytes:
    """Return an image as PNG by OpenCV; level None is OpenCV's default."""
    import cv2

    flags = [] if level is None else [cv2.IMWRITE_PNG_COMPRESSION, level]
    return bytes(cv2.imencode(".png", pixels[:, :, ::-1], flags)[1])


def _pillow(pixels: Pixels, image_format: str, **options: Any) -> bytes:
    """Return an image in a format of Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def _has_opencv() -> bool:
    """Return whether OpenCV can be imported."""
    try:
        import cv2  # noqa: F401
    except ImportError:
        return False
    return True


def format_encode(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
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
