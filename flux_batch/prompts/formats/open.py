"""Opening a prompts file: its format is told by its contents first, then by its name."""

from __future__ import annotations

import codecs
import json
import posixpath
import re
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from flux_batch.errors import SourceError
from flux_batch.prompts.formats.arrow import ARROW_MAGIC, STREAM_MAGIC, ArrowTable
from flux_batch.prompts.formats.comma_separated import CsvTable
from flux_batch.prompts.formats.file import PromptBytes
from flux_batch.prompts.formats.json_lines import JsonLinesTable
from flux_batch.prompts.formats.json_table import JsonTable
from flux_batch.prompts.formats.parquet import ParquetTable
from flux_batch.prompts.formats.tab_separated import TsvTable
from flux_batch.prompts.formats.table import Table
from flux_batch.prompts.formats.tar import TarTable
from flux_batch.prompts.formats.text import BlockTable, TextTable
from flux_batch.redaction import public_uri

TABLE_FORMATS: Mapping[str, Callable[[PromptBytes], Table]] = {
    "parquet": ParquetTable,
    "jsonl": JsonLinesTable,
    "csv": CsvTable,
    "txt": TextTable,
    "tsv": TsvTable,
    "json": JsonTable,
    "ndjson": JsonLinesTable,
    "arrow": ArrowTable,
    "feather": ArrowTable,
    "tar": TarTable,
}
_COMPRESSIONS = ("gz", "zst", "bz2", "xz")
# Formats that are not read, with the way to convert them.
_OFFICE = "save the sheet as CSV"
INSTEAD = {
    **dict.fromkeys(("xlsx", "xls", "xlsm", "ods", "numbers"), _OFFICE),
    **dict.fromkeys(("sqlite", "sqlite3", "db", "duckdb"), "export the table as CSV or Parquet"),
    **dict.fromkeys(("orc", "avro", "h5", "hdf5", "pkl", "pickle", "npy", "npz", "mdb"), "write it as Parquet"),
    **dict.fromkeys(("zip", "7z", "rar"), "unpack it into a folder"),
    **dict.fromkeys(("docx", "doc", "pdf", "rtf", "odt", "html", "md"), "save it as text, one prompt per line (.txt)"),
    **dict.fromkeys(("yaml", "yml", "xml", "toml"), "write it as JSON Lines (.jsonl)"),
}
_MAGICS = {
    b"PAR1": "parquet",
    ARROW_MAGIC: "arrow",
    STREAM_MAGIC: "arrow",
    b"PK\x03\x04": "zip",
    b"SQLite format 3\x00": "sqlite",
    b"\x89HDF": "hdf5",
    b"ORC": "orc",
    b"Obj\x01": "avro",
    b"%PDF": "pdf",
    b"\xd0\xcf\x11\xe0": "xls",
}
_TEXTS = ("txt", "csv", "tsv")
_TAR_MAGIC, _TAR_MAGIC_END = b"ustar", 262
# The start of a file of blocks.
_BLOCKS = re.compile(rb"(\xef\xbb\xbf)?\s*positive\s*:", re.IGNORECASE)
# The start of a web page, which a server may send instead of a file, e.g. to log in or to show the file. Two tags must
# follow each other, since a prompt may begin with "<html>" too.
_WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html)\b[^>]*>\s*<", re.IGNORECASE)
# The longest line that is read to distinguish JSON Lines from a single object.
_LONG_LINE = 1 << 24


def open_table(uri: str, storage_options: Mapping[str, Any], *, has_blocks: bool = True) -> Table:
    """Open a prompts file.

    has_blocks: recognise text files of blocks, which old runs read line by line.
    Raises: SourceError for a format that is not read, with the way to convert it.
    """
    file = PromptBytes.of(uri, storage_options)
    if _WEB_PAGE.match(file.head):
        raise SourceError(f"{uri}: is a web page, not prompts; open it in a browser, and use the address of the file")
    name = format_of_name(public_uri(uri))
    found = _format(file, name if name in (*TABLE_FORMATS, *INSTEAD) else _format_of_query(uri))
    if has_blocks and found == "txt" and _BLOCKS.match(file.head):
        return BlockTable(file)
    if found in TABLE_FORMATS:
        return TABLE_FORMATS[found](file)
    shown = name if found == "zip" and INSTEAD.get(name) == _OFFICE else found
    if shown in INSTEAD:
        raise SourceError(f"{uri}: .{shown} is not read: {INSTEAD[shown]}")
    known = ", ".join(f".{known}" for known in TABLE_FORMATS)
    raise SourceError(f"{uri}: its format is unknown; prompts must be {known}")


def format_of_name(name: str) -> str:
    """Return the format by a file's name, ignoring the suffix of a compression; empty without a suffix."""
    parts = posixpath.basename(name).lower().split(".")
    while len(parts) > 2 and parts[-1] in _COMPRESSIONS:
        parts.pop()
    return {"tgz": "tar"}.get(parts[-1], parts[-1]) if len(parts) > 1 else ""


def _format_of_query(uri: str) -> str:
    """Return the format named in the query of a web address, as in `export?format=csv`; empty without one."""
    for _, value in parse_qsl(urlsplit(uri).query if "://" in uri else ""):
        if (found := format_of_name(value) or value.lower()) in TABLE_FORMATS:
            return found
    return ""


def _format(file: PromptBytes, name: str) -> str:
    """Return the format of a file: by its first bytes, then by its name, then by its text."""
    for magic, kind in _MAGICS.items():
        # A text may begin with these three letters too: "ORC warrior".
        if file.head.startswith(magic) and not (kind == "orc" and name in _TEXTS):
            return kind
    if name in ("jsonl", "ndjson"):
        return "json" if _begins_array_of_rows(file.head) else name
    if name in ("csv", "tsv"):
        return _json_of_another_name(file) or name
    if name and name != "json":
        return name
    with file.open_decompressed() as stored:
        if stored.read(_TAR_MAGIC_END).endswith(_TAR_MAGIC):
            return "tar"
    return _format_of_text(file) or name


def _format_of_text(file: PromptBytes) -> str:
    """Return the JSON format of a text; empty if it is not JSON."""
    first, second = _first_lines(file)
    if first[:1] == b"[":
        return "json"
    if first[:1] == b"{":
        return "jsonl" if _is_object(first) and second else "json"
    return ""


def _first_lines(file: PromptBytes) -> list[bytes]:
    """Return the first two lines of a text that are not blank; empty lines if there are fewer."""
    with file.open_text() as text:
        lines = (line.removeprefix(codecs.BOM_UTF8).strip() for line in iter(lambda: text.readline(_LONG_LINE), b""))
        return [*islice(filter(None, lines), 2), b"", b""][:2]


def _json_of_another_name(file: PromptBytes) -> str:
    """Return the JSON format of a file named .csv or .tsv; empty if its first line may be a header."""
    if _begins_array_of_rows(file.head):
        return "json"
    if not file.head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        return ""
    return "jsonl" if _is_object(_first_lines(file)[0]) else ""


def _begins_array_of_rows(head: bytes) -> bool:
    """Return whether a file begins as an array of objects, unlike JSON Lines."""
    return re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", head) is not None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
