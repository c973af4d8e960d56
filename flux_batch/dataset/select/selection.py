"""A selection: the images of a run that were chosen, as a table of key, split and reason.

`_run/selections/NAME.parquet` has a row for each chosen image, in the order of the run. The criteria and the counts of
left-out images are in the file's metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from flux_batch.errors import AlreadyExists, DamagedObject, JobError, NotFound, StoreError, did_you_mean, one_line
from flux_batch.output.formats import DECODE_ERRORS
from flux_batch.output.metadata import parquet_bytes, parquet_table
from flux_batch.output.paths import SELECTIONS
from flux_batch.storage.store import Store

_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("key", "split", "reason")])
# The key of the criteria and counts in the file's metadata.
_MADE_BY = b"flux_batch"
_NAME = re.compile(r"\w[\w.-]*")


def write_selection(store: Store, name: str, table: pa.Table, origin: Mapping[str, Any], *, replace: bool) -> bool:
    """Write a selection atomically. Returns: whether it is new; False if the same one existed.

    Raises: JobError if another selection has the name, unless `replace`.
    """
    text = json.dumps(origin, sort_keys=True, ensure_ascii=False).encode()
    data = parquet_bytes(table.cast(_SCHEMA.with_metadata({_MADE_BY: text})))
    key = _file(name)
    if replace:
        store.write(key, data)
        return True
    try:
        store.put_if_absent(key, data)
    except AlreadyExists as error:
        if store.read(key) == data:
            return False
        theirs = made_by(store, name)
        raise JobError(f"{store.url(key)}: {_difference(theirs, origin)}; take another name, or --replace") from error
    return True


def read_selection(store: Store, name: str) -> pa.Table:
    """Read a selection: key, split, reason. Raises: JobError if it does not exist; DamagedObject."""
    key = _file(name)
    try:
        table = parquet_table(store.read(key))
        return table.select(_SCHEMA.names)
    except NotFound as error:
        known = [file.removesuffix(".parquet") for file in store.children(SELECTIONS)]
        raise JobError(f"{store.url(key)}: there is no selection {name!r}{did_you_mean(name, known)}") from error
    except StoreError:
        raise
    except DECODE_ERRORS as error:
        raise DamagedObject(f"{store.url(key)}: is damaged: {one_line(error)}; remove it and select again") from error


def made_by(store: Store, name: str) -> dict[str, Any]:
    """Read the criteria of a selection and the counts of left-out images. Raises: the errors of `read_selection`."""
    return dict(json.loads((read_selection(store, name).schema.metadata or {}).get(_MADE_BY, b"{}")))


def check_name(name: str) -> None:
    """Raise JobError for a name that cannot be a file name."""
    if not _NAME.fullmatch(name):
        raise JobError(f"selection {name!r}: a name has letters, digits, '_', '-' and '.' alone")


def _file(name: str) -> str:
    check_name(name)
    return f"{SELECTIONS}/{name}.parquet"


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Return the differences of two selections of the same name, for a message."""
    before, now = theirs.get("criteria", {}), ours["criteria"]
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if not changed:
        return "a selection of the same criteria is there, but the run or its annotations have changed since"
    return "another selection has that name: " + ", ".join(
        difference(name, before.get(name), now.get(name)) for name in changed
    )


def difference(name: str, theirs: Any, ours: Any) -> str:
    """Return the difference of a value there and here, for a message."""
    there, here = ("none" if value is None else repr(value) for value in (theirs, ours))
    return f"{name} is {there} there, {here} here"
