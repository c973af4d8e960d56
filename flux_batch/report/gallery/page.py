"""The page of a gallery: one HTML file with its images inside, no script, nothing fetched from anywhere.

Everything a row says is data: escaped, cut to a length, free of control characters.
"""

from __future__ import annotations

import base64
import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from flux_batch.images import SUFFIXES
from flux_batch.output.paths import TRAIN
from flux_batch.report.gallery.content import Gallery, Shown
from flux_batch.report.gallery.rows import Row

LONGEST_PROMPT, LONGEST_VALUE = 2000, 300
# What each image says of itself in one line; what its row is called; what stands in the data set only.
FACTS = ("seed", "width", "height", "num_inference_steps", "embedded_guidance")
NAMES = ("key", "id", "prompt")
NOT_SHOWN = {"image_index", "status", "error_type", "error_message", "file_name", "sha256", "bytes"}
# An image in a file of its own can be opened from here.
SINGLE_IMAGE = re.compile(rf"{TRAIN}/[^/]+/[^/]+\.({'|'.join(SUFFIXES.values())})")

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1d1d1f; --faint: #5f6368; --line: #dadce0; --card: #f6f7f8; }
@media (prefers-color-scheme: dark) {
  :root { --back: #131416; --text: #e8eaed; --faint: #a3a8ae; --line: #3c4043; --card: #1e2022; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 110rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p { margin: 0; } a { color: inherit; } .faint { color: var(--faint); font-size: .85rem; }
.images { display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 12rem), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  content-visibility: auto; contain-intrinsic-size: auto 20rem; }
img, .none { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain; }
.none { display: grid; place-content: center; padding: 1rem; text-align: center; color: var(--faint);
  border-bottom: 1px dashed var(--line); }
figcaption { padding: .6rem .7rem .7rem; } .prompt { max-height: 8.7em; overflow-y: auto; white-space: pre-line; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .6rem; margin: .2rem 0 0; font-size: .85rem; }
dt { color: var(--faint); } dd { margin: 0; max-height: 5.8em; overflow-y: auto; }
@media (max-width: 40rem) { .images { gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); } }
.table { overflow-x: auto; }
table { border-collapse: collapse; table-layout: fixed; min-width: 40rem; width: 100%; font-size: .9rem; }
th:nth-child(even) { width: 34%; }
th, td { text-align: start; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
"""


def page(gallery: Gallery) -> str:
    """Write the page. No date: the same run, the same bytes."""
    rows = [each.row for each in gallery.shown if not each.problem]
    own, common = _columns(rows, gallery.columns)
    # No script can run and nothing can be fetched, whatever a row may hold.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{text(gallery.name)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{text(gallery.name)}</h1>
<p>{_counts(gallery)}</p>
<p class="faint">The images were made by a model from text.</p>
{_common(common)}<div class="images">
{"".join(_figure(each, own) for each in gallery.shown)}</div>
{_failures(gallery)}</body>
</html>
"""


def text(value: Any, longest: int = LONGEST_VALUE) -> str:
    """Turn any value of a row into text that is safe anywhere in HTML, of at most `longest` characters."""
    plain = value if isinstance(value, str) else _plain(value)
    shown = plain if len(plain) <= longest else plain[: longest - 1] + "\u2026"
    return html.escape("".join("\ufffd" if _is_control(one) else one for one in shown))


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"


def _columns(rows: Sequence[Row], asked: Sequence[str] | None) -> tuple[list[str], dict[str, Any]]:
    """Choose what an image says besides its facts. Returns: these columns, and the values that all have in common."""
    names = [name for name in (rows[0] if rows else ()) if name not in (*FACTS, *NAMES) and name not in NOT_SHOWN]
    differ = [name for name in names if len({repr(row.get(name)) for row in rows}) > 1]
    common = {name: rows[0][name] for name in names if name not in differ and rows[0][name] not in (None, "")}
    return (differ if asked is None else list(asked)), common


def _counts(gallery: Gallery) -> str:
    """Say how much is shown of how much."""
    shown, made = f"{len(gallery.shown):,}", f"{gallery.num_made:,}"
    images = f"{made} images" if shown == made else f"{shown} of {made} images, evenly spread over the run"
    failed = f'<a href="#failed">{gallery.num_failed:,} failed</a>' if gallery.num_failed else "none failed"
    shards = f"{gallery.num_committed:,} of {gallery.num_shards:,} shards committed"
    return f"{images} &middot; {failed} &middot; {'complete' if gallery.is_complete else shards}"


def _common(common: dict[str, Any]) -> str:
    if not common:
        return ""
    return f"<details><summary>The same for all of them</summary>\n{_pairs(common.items())}</details>\n"


def _pairs(pairs: Iterable[tuple[str, Any]]) -> str:
    entries = [f"<dt>{text(name)}</dt><dd><bdi>{text(value)}</bdi></dd>" for name, value in pairs]
    return f"<dl>{''.join(entries)}</dl>\n" if entries else ""


def _figure(shown: Shown, own: Sequence[str]) -> str:
    """Lay out one image; its row in the data set is named last."""
    row = shown.row
    image = _image(shown)
    values = [(name, row[name]) for name in own if row.get(name) not in (None, "")]
    return (
        f"<figure>{image}<figcaption>"
        f'<p class="prompt" dir="auto">{text(row.get("prompt"), LONGEST_PROMPT)}</p>'
        f'<p class="faint">{" &middot; ".join(_facts(row))}</p>'
        f"{_pairs(values)}"
        f'<p class="faint">{text(row.get("key"))} <bdi>{text(row.get("id"))}</bdi></p>'
        "</figcaption></figure>\n"
    )


def _image(shown: Shown) -> str:
    if shown.thumbnail is None:
        return f'<div class="none">No image: {text(shown.problem)}</div>'
    small = shown.thumbnail
    image = (
        f'<img src="data:image/webp;base64,{base64.b64encode(small.data).decode()}" width="{small.width}" '
        f'height="{small.height}" alt="{text(shown.row.get("prompt"))}" loading="lazy" decoding="async">'
    )
    file_name = str(shown.row.get("file_name"))
    return f'<a href="../../{quote(file_name)}">{image}</a>' if SINGLE_IMAGE.fullmatch(file_name) else image


def _facts(row: Row) -> list[str]:
    """Say seed, size, steps and guidance, as far as a row has them."""
    words = {  # no line breaks within one of them
        "seed\u00a0{seed}": ("seed",),
        "{width}\u00a0x\u00a0{height}": ("width", "height"),
        "{num_inference_steps}\u00a0steps": ("num_inference_steps",),
        "guidance\u00a0{embedded_guidance}": ("embedded_guidance",),
    }
    known = {name: text(row[name]) for name in FACTS if row.get(name) is not None}
    return [label.format(**known) for label, names in words.items() if known.keys() >= set(names)]


def _failures(gallery: Gallery) -> str:
    if not gallery.failed:
        return ""
    num, shown = gallery.num_failed, len(gallery.failed)
    title = f"{num:,} failed" if shown >= num else f"{num:,} failed, the first {shown:,}"
    rows = "".join(
        f"<tr><td><bdi>{text(row.get('id'))}</bdi></td><td dir=auto>{text(row.get('prompt'))}</td>"
        f"<td>{text(row.get('error_type'))}</td><td dir=auto>{text(row.get('error_message'))}</td></tr>\n"
        for row in gallery.failed
    )
    return (
        f'<h2 id="failed">{title}</h2>\n<div class="table"><table>\n'
        f"<tr><th>id</th><th>prompt</th><th>error</th><th>reason</th></tr>\n{rows}</table></div>\n"
    )
