"""The contact sheet of a gallery: some of its images with their prompts in one image, for a README."""

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
from flux_batch.report.gallery.content import Gallery, Shown

# Images on the sheet, and pixels: an image's box, the lines below it, what is between two boxes.
MOST = 48
CELL, LINE, LABEL_LINES, GAP, TITLE = 200, 17, 4, 14, 44
FONT_SIZE, TITLE_SIZE = 13, 20
BACK, TEXT, FAINT, EMPTY = "#ffffff", "#1d1d1f", "#5f6368", "#e8eaed"
JPEG = ImageConfig(type="jpeg", quality=90)


def sheet(gallery: Gallery) -> bytes:
    """Draw the sheet as JPEG, labelled as AI generated; of many images, MOST at even distances."""
    shown = _some(gallery.shown)
    columns = max(1, math.ceil(math.sqrt(len(shown) * 4 / 3)))
    width = GAP + max(columns, 3) * (CELL + GAP)
    row_height = CELL + LABEL_LINES * LINE + GAP
    canvas = Image.new("RGB", (width, TITLE + GAP + max(1, math.ceil(len(shown) / columns)) * row_height), BACK)
    draw = ImageDraw.Draw(canvas)
    title = _fitted([gallery.summary(len(shown))], _font(TITLE_SIZE), width - 2 * GAP, 1)
    draw.text((GAP, GAP), title[0], TEXT, _font(TITLE_SIZE))
    for number, each in enumerate(shown):
        row, column = divmod(number, columns)
        _draw_cell(canvas, draw, each, GAP + column * (CELL + GAP), TITLE + GAP + row * row_height)
    return encode(np.asarray(canvas), JPEG, {"prompt": f"contact sheet of {gallery.name}"})


def _some(shown: Sequence[Shown]) -> list[Shown]:
    num = min(MOST, len(shown))
    return [shown[(2 * number + 1) * len(shown) // (2 * num)] for number in range(num)]


def _draw_cell(canvas: Image.Image, draw: ImageDraw.ImageDraw, shown: Shown, left: int, top: int) -> None:
    """Draw an image in its box, or an empty box, and what it is below."""
    if shown.thumbnail is None:
        draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), EMPTY)
        draw.text((left + CELL / 2, top + CELL / 2), "no image", FAINT, _font(FONT_SIZE), anchor="mm")
    else:
        with Image.open(io.BytesIO(shown.thumbnail.data)) as image:
            fitted = ImageOps.contain(image.convert("RGB"), (CELL, CELL), Image.Resampling.LANCZOS)
        canvas.paste(fitted, (left + (CELL - fitted.width) // 2, top + (CELL - fitted.height) // 2))
    font = _font(FONT_SIZE)
    below = top + CELL + 3
    lines = _fitted(_words(shown), font, CELL, LABEL_LINES - 1)
    for number, line in enumerate(lines):
        draw.text((left, below + number * LINE), line, TEXT, font)
    if shown.row.get("seed") is not None:
        draw.text((left, below + len(lines) * LINE), f"seed {shown.row['seed']}", FAINT, font)


def _words(shown: Shown) -> list[str]:
    """Give the words of the prompt; the key, if the font has not most of its letters."""
    prompt = str(shown.row.get("prompt") or "")[: 4 * CELL]
    drawn = "".join(_drawable(one) for one in prompt)
    if drawn.count("?") - prompt.count("?") > len(prompt) / 4 or not drawn.strip():
        drawn = "".join(_drawable(one) for one in str(shown.row.get("key"))[:CELL])
    return drawn.split()


def _fitted(words: Sequence[str], font: ImageFont.FreeTypeFont, width: int, num_lines: int) -> list[str]:
    """Break words into lines of at most `width` pixels; what does not fit into the last ends in dots."""
    lines: list[str] = []
    left = list(words)
    while left and len(lines) < num_lines:
        num = 1
        while num < len(left) and font.getlength(" ".join(left[: num + 1])) <= width:
            num += 1
        line, left = " ".join(left[:num]), left[num:]
        is_cut = bool(left) and len(lines) == num_lines - 1
        lines.append(_cut(line, font, width, is_cut))
    return lines or [""]


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int, is_cut: bool) -> str:
    """Shorten a line to `width` pixels; dots say that something is missing."""
    shown = line + "..." if is_cut else line
    while line and font.getlength(shown) > width:
        line = line[:-1]
        shown = line.rstrip() + "..."
    return shown


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font that comes with Pillow, which needs no font on the machine."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise TypeError("Pillow was built without FreeType")  # no wheel is
    return font


@cache
def _drawable(character: str) -> str:
    """Give a character as the font can draw it: itself, without its accent, or a question mark."""
    if character.isspace():
        return " "
    for one in (character, unicodedata.normalize("NFKD", character)[0]):
        if one.isprintable() and _mask(one) != _mask("\uffff"):
            return one
    return "?"


def _mask(character: str) -> bytes:
    return bytes(_font(FONT_SIZE).getmask(character))
