"""The contact sheet of a gallery: one image that shows some of its images with their prompts."""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from flux_batch.config.schema import ImageConfig
from flux_batch.images import encode
from flux_batch.report.gallery.content import Gallery, GalleryImage
from flux_batch.report.gallery.rows import spread

MAX_IMAGES = 48
# In pixels: the square box of an image, a line of text below it (LABEL_LINES of them), the gap, the title's height.
CELL, LINE, LABEL_LINES, GAP, TITLE = 200, 17, 4, 14, 44
BACKGROUND, EMPTY = "#ffffff", "#e8eaed"
_FONT_SIZE, _TITLE_SIZE = 13, 20
_TEXT, _FAINT = "#1d1d1f", "#5f6368"
_JPEG = ImageConfig(type="jpeg", quality=90)


def draw_sheet(gallery: Gallery) -> bytes:
    """Draw the sheet as JPEG, labelled as AI generated. It shows at most MAX_IMAGES, evenly spread."""
    images = [gallery.images[number] for number in spread(len(gallery.images), MAX_IMAGES)]
    columns = max(1, math.ceil(math.sqrt(len(images) * 4 / 3)))
    width = GAP + max(columns, 3) * (CELL + GAP)
    row_height = CELL + LABEL_LINES * LINE + GAP
    height = TITLE + GAP + max(1, math.ceil(len(images) / columns)) * row_height
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    title = fit_lines([gallery.summary(len(images))], load_font(_TITLE_SIZE), width - 2 * GAP, 1)
    draw.text((GAP, GAP), title[0], _TEXT, load_font(_TITLE_SIZE))
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        _draw_cell(canvas, draw, image, GAP + column * (CELL + GAP), TITLE + GAP + row * row_height)
    return encode(np.asarray(canvas), _JPEG, {"prompt": f"contact sheet of {gallery.name}"})


def _draw_cell(canvas: Image.Image, draw: ImageDraw.ImageDraw, image: GalleryImage, left: int, top: int) -> None:
    """Draw an image or an empty box, and its prompt and seed below."""
    if image.thumbnail is None:
        draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), EMPTY)
        draw.text((left + CELL / 2, top + CELL / 2), "no image", _FAINT, load_font(_FONT_SIZE), anchor="mm")
    else:
        with Image.open(io.BytesIO(image.thumbnail.data)) as thumbnail:
            fitted = ImageOps.contain(thumbnail.convert("RGB"), (CELL, CELL), Image.Resampling.LANCZOS)
        canvas.paste(fitted, (left + (CELL - fitted.width) // 2, top + (CELL - fitted.height) // 2))
    font = load_font(_FONT_SIZE)
    below = top + CELL + 3
    lines = fit_lines(_label(image), font, CELL, LABEL_LINES - 1)
    for number, line in enumerate(lines):
        draw.text((left, below + number * LINE), line, _TEXT, font)
    if image.row.get("seed") is not None:
        draw.text((left, below + len(lines) * LINE), f"seed {image.row['seed']}", _FAINT, font)


def _label(image: GalleryImage) -> list[str]:
    """Return the words of the prompt, or the key if the font lacks most letters."""
    prompt = str(image.row.get("prompt") or "")[: 4 * CELL]
    text = "".join(_drawable(character) for character in prompt)
    if text.count("?") - prompt.count("?") > len(prompt) / 4 or not text.strip():
        text = "".join(_drawable(character) for character in str(image.row.get("key"))[:CELL])
    return text.split()


def fit_lines(words: Sequence[str], font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Break words into lines of at most `width` pixels; dots end the last line if words are left out."""
    lines: list[str] = []
    left = list(words)
    while left and len(lines) < max_lines:
        num = 1
        while num < len(left) and font.getlength(" ".join(left[: num + 1])) <= width:
            num += 1
        line, left = " ".join(left[:num]), left[num:]
        is_cut = bool(left) and len(lines) == max_lines - 1
        lines.append(_cut(line, font, width, is_cut))
    return lines or [""]


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int, is_cut: bool) -> str:
    """Shorten a line to `width` pixels; dots at its end stand for missing text."""
    cut = line + "..." if is_cut else line
    while line and font.getlength(cut) > width:
        line = line[:-1]
        cut = line.rstrip() + "..."
    return cut


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font of the package Pillow, so that the machine needs no font."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise TypeError("Pillow was built without FreeType")  # Pillow's wheels have it
    return font


@cache
def _drawable(character: str) -> str:
    """Return a character that the font can draw: itself, itself without accent, or a question mark."""
    if character.isspace():
        return " "
    for candidate in (character, unicodedata.normalize("NFKD", character)[0]):
        if candidate.isprintable() and _mask(candidate) != _mask("\uffff"):
            return candidate
    return "?"


def _mask(character: str) -> bytes:
    return bytes(load_font(_FONT_SIZE).getmask(character))
