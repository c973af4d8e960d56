"""The gallery of a run: a page with its images and settings, and a contact sheet, both written into its output."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flux_batch.output.paths import GALLERY
from flux_batch.report.gallery.content import Gallery, read_gallery
from flux_batch.report.gallery.page import render_page
from flux_batch.report.gallery.rows import Row
from flux_batch.report.gallery.sheet import draw_sheet
from flux_batch.storage.store import Store

PAGE = f"{GALLERY}/index.html"
SHEET = f"{GALLERY}/contact-sheet.jpg"


def write_gallery(
    store: Store,
    max_images: int,
    columns: Sequence[str] | None = None,
    further: Callable[[Row], Mapping[str, Any]] | None = None,
) -> Gallery:
    """Read a run, write PAGE and SHEET into it, and return what they show.

    further: returns columns to show with those of a row.
    Raises: JobError if there is no run, for a number out of range or a column that no image has; StoreError.
    """
    gallery = read_gallery(store, max_images, columns)
    if further:
        images = [replace(image, row={**image.row, **further(image.row)}) for image in gallery.images]
        gallery = replace(gallery, images=images)
    _write_by_name(store, SHEET, draw_sheet(gallery))
    _write_by_name(store, PAGE, render_page(gallery).encode())
    return gallery


def format_gallery(store: Store, gallery: Gallery) -> str:
    """Return three lines for people: what is shown, and where the page and the sheet are."""
    return f"{gallery.summary(len(gallery.images))}\npage          {store.url(PAGE)}\ncontact sheet {store.url(SHEET)}"


def _write_by_name(store: Store, key: str, data: bytes) -> None:
    """Write through a local file of the same name: a bucket takes the content type for browsers from its ending."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, key.rpartition("/")[2])
        path.write_bytes(data)
        store.write(key, path)
