"""A look at a run: one page with its images and settings, and a contact sheet; both lie in the run itself."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from flux_batch.output.paths import GALLERY
from flux_batch.report.gallery.content import Gallery, read_gallery
from flux_batch.report.gallery.page import page
from flux_batch.report.gallery.sheet import sheet
from flux_batch.storage.store import Store

PAGE = f"{GALLERY}/index.html"
SHEET = f"{GALLERY}/contact-sheet.jpg"


def write_gallery(store: Store, max_images: int, columns: Sequence[str] | None = None) -> Gallery:
    """Read a run and write PAGE and SHEET into it, over those of before. Returns: what they show.

    Raises: JobError if there is no run, for a number out of range or a column that no image has; StoreError.
    """
    gallery = read_gallery(store, max_images, columns)
    _write_named(store, SHEET, sheet(gallery))
    _write_named(store, PAGE, page(gallery).encode())
    return gallery


def format_gallery(store: Store, gallery: Gallery) -> str:
    """Say in three lines what was made and where it is."""
    return f"{gallery.summary(len(gallery.shown))}\npage          {store.url(PAGE)}\ncontact sheet {store.url(SHEET)}"


def _write_named(store: Store, key: str, data: bytes) -> None:
    """Write through a file of the same name: by its ending, a bucket learns what to tell browsers that it is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, key.rpartition("/")[2])
        path.write_bytes(data)
        store.write(key, path)
