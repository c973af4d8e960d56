"""The gallery in a single file: a page with its images inside, without scripts and without external resources.

Jinja escapes every value of a row; the filters limit its length and remove control characters.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from flux_batch.images import SUFFIXES
from flux_batch.output.paths import TRAIN
from flux_batch.report.gallery.content import Gallery
from flux_batch.report.gallery.rows import Row
from flux_batch.report.template import load_template

_MAX_LENGTH = 300
# Columns that are not in the list under an image: shown as facts, shown elsewhere, or relevant to the data set only.
_FACTS = ("seed", "width", "height", "num_inference_steps", "embedded_guidance")
_NAMES = ("key", "id", "prompt")
_NOT_SHOWN = {"image_index", "status", "error_type", "error_message", "file_name", "sha256", "bytes"}
# Columns that are shown only if they are true.
_TRUNCATED = {"clip_truncated", "t5_truncated"}
# Control characters except tabs and line ends, and lone surrogates.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# The name of an image in a file of its own, which the page can link.
_SINGLE_IMAGE = re.compile(rf"{TRAIN}/[^/]+/[^/]+\.({'|'.join(SUFFIXES.values())})")


def render_page(gallery: Gallery) -> str:
    """Return the page as HTML. It has no date: the same run gives the same bytes."""
    rows = [each.row for each in gallery.images if not each.problem]
    own, common = _split_columns(rows, gallery.columns)
    template = load_template(
        "gallery",
        "page.html",
        base64=_base64,
        facts=_facts,
        link=_link,
        plain=plain,
        thousands=_thousands,
        values_of=_values_of,
    )
    return template.render(gallery=gallery, own=own, common=common)


def _split_columns(rows: Sequence[Row], asked: Sequence[str] | None) -> tuple[list[str], list[tuple[str, Any]]]:
    """Return the columns to show under each image, and the values common to all."""
    names = [name for name in (rows[0] if rows else ()) if name not in (*_FACTS, *_NAMES) and name not in _NOT_SHOWN]
    differ = [name for name in names if len({repr(row.get(name)) for row in rows}) > 1]
    common = [name for name in names if name not in differ]
    return (differ if asked is None else list(asked)), _values_of(rows[0], common) if rows else []


def _values_of(row: Row, names: Sequence[str]) -> list[tuple[str, Any]]:
    """Return names and values of some columns, without empty ones."""
    empty = {name: (None, "", False) if name in _TRUNCATED else (None, "") for name in names}
    return [(name, row[name]) for name in names if row.get(name) not in empty[name]]


def _facts(row: Row) -> list[str]:
    """Return seed, size, steps and guidance as text, if a row has them."""
    words = {  # without line breaks inside, except before a seed, which can be as wide as a card
        "seed {seed}": ("seed",),
        "{width}\u00a0x\u00a0{height}": ("width", "height"),
        "{num_inference_steps}\u00a0steps": ("num_inference_steps",),
        "guidance\u00a0{embedded_guidance}": ("embedded_guidance",),
    }
    known = {name: plain(row[name]) for name in _FACTS if row.get(name) is not None}
    return [label.format(**known) for label, names in words.items() if known.keys() >= set(names)]


def _link(row: Row) -> str:
    """Return the address of an image's own file, relative to the output; "" if it has none."""
    file_name = str(row.get("file_name"))
    return quote(file_name) if _SINGLE_IMAGE.fullmatch(file_name) else ""


def plain(value: Any, max_length: int = _MAX_LENGTH) -> str:
    """Return any value as text of at most `max_length` characters, control characters replaced."""
    text = value.replace("\r\n", "\n") if isinstance(value, str) else _to_text(value)
    cut = text if len(text) <= max_length else text[: max_length - 1] + "\u2026"
    return _CONTROL.sub("\ufffd", cut)


def _to_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _thousands(number: int) -> str:
    return f"{number:,}"
