"""Input images: every mode becomes upright RGB, and a hostile or damaged image only fails its row."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flux_batch.errors import RowError, SourceError, StoreError
from flux_batch.prompts import input_images, safe_http
from flux_batch.prompts.input_images import check_job_image, decode, image_of_bytes, load_image, spilled
from flux_batch.records import InputImage
from flux_batch.storage.store import Store
from helpers.s3 import Bucket
from helpers.web_server import web_server

RED, BLUE = (200, 30, 40), (10, 20, 220)


def halves(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Return a red image with a blue left half."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (0, 0, size[0] // 2, size[1]))
    return image.convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def load(path: Path | str, within: tuple[str, ...] | None = None, **options: Any) -> Image.Image:
    return load_image(InputImage(name="it", uri=str(path), allowed_roots=within), {}, **options)


def refusal(data: bytes) -> str:
    with pytest.raises(RowError) as caught:
        decode(data)
    return str(caught.value)


def assert_halves(image: Image.Image, left: tuple[int, ...], right: tuple[int, ...], tolerance: int = 0) -> None:
    assert image.mode == "RGB"
    width, height = image.size
    for x, expected in ((1, left), (width - 2, right)):
        assert np.abs(np.subtract(image.getpixel((x, height // 2)), expected)).max() <= tolerance


# --- decoding


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("GIF", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {}, 20),
        ("JPEG", {"quality": 95}, 20),
        ("JPEG", {"progressive": True, "quality": 95}, 20),
        ("MPO", {"quality": 95}, 20),
    ],
)
def test_every_format_of_the_list(format: str, options: dict[str, Any], tolerance: int) -> None:
    found = decode(encoded(halves(), format, **options))

    assert found.size == (24, 16)
    assert_halves(found, BLUE, RED, tolerance)


@pytest.mark.parametrize(
    ("format", "mode"), [("PNG", "P"), ("PNG", "L"), ("PNG", "1"), ("TIFF", "CMYK"), ("JPEG", "CMYK")]
)
def test_other_modes(format: str, mode: str) -> None:
    image = halves(mode)
    expected = image.convert("RGB")

    assert_halves(decode(encoded(image, format)), expected.getpixel((1, 8)), expected.getpixel((22, 8)), 20)


def test_transparency_is_white() -> None:
    image = halves("RGBA")
    image.paste((*BLUE, 0), (0, 0, 12, 16))
    assert_halves(decode(encoded(image)), (255, 255, 255), RED)
    assert_halves(decode(encoded(image, "WEBP", lossless=True)), (255, 255, 255), RED)

    half = Image.new("RGBA", (24, 16), (0, 0, 0, 51))
    assert_halves(decode(encoded(half)), (204, 204, 204), (204, 204, 204))
    grey = Image.new("LA", (24, 16), (0, 51))
    assert_halves(decode(encoded(grey)), (204, 204, 204), (204, 204, 204))

    palette = Image.new("P", (24, 16), 0)
    palette.putpalette([*RED, *BLUE])
    palette.paste(1, (0, 0, 12, 16))
    assert_halves(decode(encoded(palette, transparency=1)), (255, 255, 255), RED)
    assert_halves(decode(encoded(palette, transparency=b"\xff\x00")), (255, 255, 255), RED)
    assert_halves(decode(encoded(halves(), transparency=BLUE)), (255, 255, 255), RED)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(format: str) -> None:
    samples = np.full((16, 24), 65535, np.uint16)
    samples[:, :12] = 128 * 257

    assert_halves(decode(encoded(Image.fromarray(samples), format)), (128,) * 3, (255,) * 3)


def test_sixteen_bits_of_colour() -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", *(257 * value for value in RED)) * 24 for _ in range(16))

    assert_halves(decode(png_of(24, 16, 2, rows, depth=16)), RED, RED)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_samples_without_a_white_are_refused(mode: str) -> None:
    assert "32-bit samples" in refusal(encoded(Image.new(mode, (8, 8)), "TIFF"))


# EXIF 2.3, Orientation: the direction of the stored rows and columns.
TURNS = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_90),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_images_are_turned_upright(orientation: int, format: str) -> None:
    image = halves()
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation

    found = decode(encoded(image, format, exif=exif, **({"lossless": True} if format == "WEBP" else {})))

    assert found.tobytes() == TURNS[orientation](image).tobytes()


def test_the_first_image_of_several() -> None:
    for format in ("GIF", "WEBP", "TIFF"):
        data = encoded(halves(), format, save_all=True, append_images=[Image.new("RGB", (24, 16))])
        assert_halves(decode(data), BLUE, RED, 20)


@pytest.mark.parametrize("format", ["ICO", "PPM", "TGA", "PCX", "EPS", "PDF", "ICNS"])
def test_other_formats_are_refused(format: str) -> None:
    assert "not an image in a format that is read: PNG, JPEG" in refusal(encoded(halves(size=(64, 64)), format))


@pytest.mark.parametrize(
    "data",
    [b"", b"\x89PNG\r\n\x1a\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"x" * 1000, b"GIF89a"],
)
def test_what_is_no_image(data: bytes) -> None:
    assert refusal(data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("tenths", range(1, 10))
def test_cut_files_are_refused(format: str, tenths: int) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, format)

    assert refusal(data[: len(data) * tenths // 10])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_damaged_files_are_refused_or_read_but_never_more(format: str) -> None:
    random = np.random.default_rng(1)
    good = np.frombuffer(encoded(halves(), format, **({"exif": b"Exif\0\0MM"} if format == "JPEG" else {})), np.uint8)
    for _ in range(60):
        data = good.copy()
        data[random.integers(0, len(data), 4)] = random.integers(0, 256, 4)
        try:
            assert decode(data.tobytes()).mode == "RGB"
        except RowError:
            continue


def png_of(width: int, height: int, colour: int, rows: bytes, depth: int = 8) -> bytes:
    """Write a PNG with false values in its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (9500, 9500), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_before_they_are_decoded(width: int, height: int) -> None:
    assert "pixels" in refusal(png_of(width, height, 2, b"\0" * 100_000))


def test_the_limit_of_pixels_is_always_ours() -> None:
    assert "more than the 64000000 pixels allowed" in refusal(png_of(60_000, 60_000, 2, b"\0" * 1000))


def test_the_largest_image_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_images, "MAX_PIXELS", 24 * 16)
    assert decode(encoded(halves())).size == (24, 16)
    assert "25 x 16 pixels, more than the 384 allowed" in refusal(encoded(halves(size=(25, 16))))


def test_a_bomb_of_text_in_a_png() -> None:
    bomb = zlib.compress(b"x" * 5_000_000, 9)
    data = b"Comment\0\0" + bomb
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    good = encoded(halves())

    assert refusal(good[:33] + chunk + good[33:])


# --- resizing


def test_a_image_is_resized_as_the_pipeline_would() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    given = image_of_bytes(encoded(image))

    assert load_image(given, {}).tobytes() == image.tobytes()
    resized = load_image(given, {}, (64, 16))
    assert resized.tobytes() == image.resize((64, 16), Image.Resampling.LANCZOS).tobytes()
    assert resized.resize((64, 16), Image.Resampling.LANCZOS).tobytes() == resized.tobytes()


# --- bytes in the row


def test_bytes_are_named_by_their_hash_and_wait_on_the_disk(tmp_path: Path) -> None:
    given = image_of_bytes(encoded(halves()))
    assert given.name.startswith("sha256:")
    assert len(given.name) == 71

    aside = spilled(given, tmp_path)

    assert (aside.name, aside.data, Path(aside.uri).parent) == (given.name, b"", tmp_path)
    assert load_image(aside, {}).tobytes() == load_image(given, {}).tobytes()
    assert spilled(aside, tmp_path) == aside


def test_bytes_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_images, "MAX_BYTES", 100)
    assert image_of_bytes(b"x" * 100)
    for data in (b"", b"x" * 101):
        with pytest.raises(RowError, match=r"^mask_image: (is empty|has more than)"):
            image_of_bytes(data, "mask_image")


# --- files


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(halves()))

    assert_halves(load(tmp_path / "a.png"), BLUE, RED)
    assert_halves(load(tmp_path / "a.png", (str(tmp_path),)), BLUE, RED)
    assert_halves(load((tmp_path / "a.png").as_uri()), BLUE, RED)


def test_what_is_wrong_with_a_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "large").write_bytes(b"x" * 1001)
    monkeypatch.setattr(input_images, "MAX_BYTES", 1000)
    for path, reason in {
        tmp_path / "none.png": f"there is no file {tmp_path}/none.png",
        tmp_path / "text" / "a.png": "Not a directory",
        tmp_path: "is not a file",
        tmp_path / "pipe": "is not a file",
        tmp_path / "loop": "cannot be read",
        tmp_path / ("x" * 300): "cannot be read",
        tmp_path / "text": "not an image",
        tmp_path / "large": "more than the 1000 bytes allowed",
        Path("/dev/zero"): "is not a file",
    }.items():
        with pytest.raises(RowError, match=reason) as caught:
            load(path)
        assert str(caught.value).startswith("input_image it: ")


def test_links_may_not_lead_out(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "a.png").write_bytes(encoded(halves()))
    (inside / "file.png").symlink_to(outside / "a.png")
    (inside / "folder").symlink_to(outside)
    (tmp_path / "again").symlink_to(inside)

    for name in ("file.png", "folder/a.png"):
        with pytest.raises(RowError, match="is a link that leads out of"):
            load(inside / name, (str(inside),))
        assert load(inside / name, (str(inside), str(outside)))
        assert load(inside / name)
    (inside / "own.png").write_bytes(encoded(halves()))
    assert load(tmp_path / "again" / "own.png", (str(tmp_path / "again"),))


def test_a_failing_disk_is_no_fault_of_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    (tmp_path / "a.png").write_bytes(encoded(halves()))
    monkeypatch.setattr(os, "open", broken)
    with pytest.raises(StoreError, match="Input/output error"):
        load(tmp_path / "a.png")


# --- stores and the web


@pytest.mark.s3
def test_an_object_in_a_bucket(s3_store: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3_store.uri, s3_store.storage_options)
    store.write("in/a b.png", encoded(halves()))
    store.write("in/empty.png", b"")

    def get(key: str) -> Image.Image:
        return load_image(InputImage(name=key, uri=f"{s3_store.uri}/{key}"), s3_store.storage_options)

    assert_halves(get("in/a b.png"), BLUE, RED)
    for key, reason in {"in/none.png": "not found", "in/empty.png": "is empty", "in": "not a file|not found"}.items():
        with pytest.raises(RowError, match=reason):
            get(key)
    monkeypatch.setattr(input_images, "MAX_BYTES", 20)
    with pytest.raises(RowError, match="more than the 20 bytes allowed"):
        get("in/a b.png")


def test_a_bucket_that_is_away_is_no_fault_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> bytes:
        raise ConnectionError("refused")

    monkeypatch.setattr(input_images, "read_object", away)
    monkeypatch.setattr("flux_batch.storage.retry.ATTEMPTS", 1)
    with pytest.raises(StoreError, match="refused"):
        load("memory://a.png")


def test_the_web(monkeypatch: pytest.MonkeyPatch) -> None:
    with web_server() as server:
        url = server.at("/a.png", encoded(halves()))
        with pytest.raises(RowError, match=r"^input_image it: 127\.0\.0\.1: is 127\.0\.0\.1, which is not a public"):
            load(url)
        assert server.asked == []
        monkeypatch.setattr(safe_http, "is_public", lambda address: True)
        assert_halves(load(url), BLUE, RED)
        with pytest.raises(RowError, match="input_image it: the server answered 404"):
            load(server.url + "/none.png")


def test_the_image_of_a_job(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(halves()))
    check_job_image(str(tmp_path / "a.png"), {})
    with pytest.raises(SourceError, match=r"^sampling\.input_image .*b\.png: there is no file"):
        check_job_image(str(tmp_path / "b.png"), {})
