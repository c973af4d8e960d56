import io

import numpy as np
import pytest
from PIL import Image

from flux_batch.config.schema import ImageConfig
from flux_batch.images import AI_SOURCE_TYPE, encode
from flux_batch.report.gallery.content import Gallery, GalleryImage, Thumbnail
from flux_batch.report.gallery.sheet import (
    BACKGROUND,
    CELL,
    EMPTY,
    GAP,
    LABEL_LINES,
    LINE,
    MAX_IMAGES,
    TITLE,
    draw_sheet,
    fit_lines,
    load_font,
)


def shown(number: int, color: tuple[int, int, int] = (200, 30, 30), width: int = 64, height: int = 64) -> GalleryImage:
    pixels = np.full((height, width, 3), color, np.uint8)
    data = encode(pixels, ImageConfig(type="webp"), {})
    return GalleryImage(
        {"key": f"{number:09}", "prompt": f"image {number}", "seed": number}, Thumbnail(data, width, height)
    )


def draw(images: list[GalleryImage], name: str = "test") -> Image.Image:
    gallery = Gallery(
        name=name,
        images=images,
        num_images=len(images),
        failed=[],
        num_failed=0,
        num_committed=1,
        num_shards=1,
        is_complete=True,
    )
    return Image.open(io.BytesIO(draw_sheet(gallery)))


def middle(image: Image.Image, row: int, column: int) -> tuple[int, ...]:
    """Return the colour in the middle of a cell."""
    left, top = GAP + column * (CELL + GAP), TITLE + GAP + row * (CELL + LABEL_LINES * LINE + GAP)
    color = image.getpixel((left + CELL // 3, top + CELL // 2))
    assert isinstance(color, tuple)
    return color


@pytest.mark.parametrize(("num", "columns", "rows"), [(1, 3, 1), (4, 3, 2), (12, 4, 3), (48, 8, 6), (200, 8, 6)])
def test_images_stand_in_a_grid(num: int, columns: int, rows: int) -> None:
    image = draw([shown(number) for number in range(num)])
    assert image.size == (
        GAP + columns * (CELL + GAP),
        TITLE + GAP + rows * (CELL + LABEL_LINES * LINE + GAP),
    )
    assert middle(image, 0, 0) == pytest.approx((200, 30, 30), abs=12)
    assert AI_SOURCE_TYPE in str(image.info.get("xmp"))


def test_many_images_are_drawn_from_the_whole_run() -> None:
    colors = [(255, 0, 0)] * 100 + [(0, 0, 255)] * 100
    image = draw([shown(number, color) for number, color in enumerate(colors)])
    assert MAX_IMAGES == 48
    assert middle(image, 2, 7) == pytest.approx((255, 0, 0), abs=12)
    assert middle(image, 3, 0) == pytest.approx((0, 0, 255), abs=12)


def test_a_wide_image_keeps_its_shape_and_a_missing_one_is_an_empty_box() -> None:
    image = draw([shown(0, width=64, height=16), GalleryImage({"key": "1"}, problem="gone"), shown(2)])
    corner = image.getpixel((GAP + 2, TITLE + GAP + 2))
    assert corner == pytest.approx(tuple(bytes.fromhex(BACKGROUND[1:])), abs=6)
    assert middle(image, 0, 0) == pytest.approx((200, 30, 30), abs=12)
    assert middle(image, 0, 1) == pytest.approx(tuple(bytes.fromhex(EMPTY[1:])), abs=6)


def test_a_run_without_images_has_a_sheet() -> None:
    assert draw([]).size[1] > TITLE


@pytest.mark.parametrize("prompt", ["", "中文" * 500, "😀", "\u202e \x00 \n", "word" * 5000, "é" * 9, None])
def test_any_prompt_can_be_drawn(prompt: str | None) -> None:
    assert draw([GalleryImage({"key": "7", "prompt": prompt}, problem="none")]).size[0] == GAP + 3 * (CELL + GAP)


def test_lines_break_between_words_and_end_in_dots() -> None:
    font = load_font(13)
    words = ["a", "quiet", "horse", "stands", "in", "the", "rain", "and", "waits", "for", "the", "end"]
    lines = fit_lines(words, font, 120, 2)
    assert len(lines) == 2
    assert lines[0] == "a quiet horse"
    assert lines[1].endswith("...")
    assert all(font.getlength(line) <= 120 for line in lines)
    assert fit_lines(["short"], font, 120, 2) == ["short"]
    (long,) = fit_lines(["x" * 500], font, 120, 2)
    assert long.endswith("x...")
    assert font.getlength(long) <= 120
