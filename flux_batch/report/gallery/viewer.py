"""The page of a gallery in chunks: HTML, style and script in one file, which loads the chunks beside it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from flux_batch.output.paths import GALLERY
from flux_batch.report.gallery.chunks import WrittenChunks
from flux_batch.report.gallery.content import RunSize
from flux_batch.report.gallery.page import plain
from flux_batch.report.template import load_template


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownRun(RunSize):
    """A run on the page: its size, the folder of its chunks, and the template of image addresses, if any."""

    folder: str
    chunks: WrittenChunks
    original: str


def render_viewer(runs: Sequence[ShownRun], columns: Sequence[str] | None) -> str:
    """Return the page of a run, or of two side by side, as HTML. It has no date: the same run gives the same bytes."""
    style, script = _source("viewer.css"), _source("viewer.js")
    return load_template("gallery", "viewer.html").render(
        runs=[_described(run) for run in runs],
        chunks=[(run.folder, key.removeprefix(f"{GALLERY}/")) for run in runs for key in run.chunks.rows],
        columns=columns,
        name=plain(runs[0].name),
        state=runs[0].state(runs[0].chunks.num_images),
        style=style,
        style_hash=_csp_hash(style),
        script=script,
        script_hash=_csp_hash(script),
    )


def _described(run: ShownRun) -> dict[str, Any]:
    """Return the values of a run for the script."""
    return {
        "name": plain(run.name),
        "folder": run.folder,
        "num_rows": run.chunks.num_rows,
        "num_failed": run.num_failed,
        "original": run.original,
    }


def _source(name: str) -> str:
    return files("flux_batch.report.gallery").joinpath(name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    """Return the hash of a text as a source of a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
