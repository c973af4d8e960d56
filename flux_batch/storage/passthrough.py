"""The user's columns that are copied into the metadata: their types and their values in each output format.

This module knows Arrow types and Python values, not the meaning of the columns.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
from collections.abc import Mapping
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa

# Arrow's type names that Hugging Face spells differently.
_HF_NAMES = {"double": "float64", "float": "float32", "date32[day]": "date32"}


def portable(kind: pa.DataType) -> pa.DataType:
    """Return the type in which a column is written: the same values, in encodings that all readers know.

    Raises: ValueError for a type that JSON or Hugging Face data sets do not have.
    """
    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return portable(kind.value_type)
    if is_text(kind) or isinstance(kind, (pa.UuidType, pa.JsonType)):
        return pa.string()
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return pa.binary()
    if types.is_fixed_size_binary(kind):
        return pa.binary()
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return pa.list_(portable(kind.value_type))
    if types.is_struct(kind):
        return pa.struct([(field.name, portable(field.type)) for field in kind])
    if types.is_float16(kind):
        return pa.float32()
    if types.is_date(kind):
        return pa.date32()
    if types.is_timestamp(kind) and kind.tz is not None and not is_known_zone(kind.tz):
        return pa.timestamp(kind.unit, "UTC")  # the same instants
    if types.is_decimal32(kind) or types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    if types.is_null(kind) or types.is_decimal(kind) or (types.is_primitive(kind) and not types.is_interval(kind)):
        return kind
    raise ValueError(f"{kind} cannot be passed through")


def is_known_zone(name: str) -> bool:
    """Return whether a time zone is an offset, or a name known to this machine."""
    if name[:1] in ("+", "-"):
        return True
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return False
    return True


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds text."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _as_arrow(value: Any, kind: pa.DataType) -> Any:
    """Return a value in its column's type, which may be wider than its file's type."""
    if value is None:
        return None
    if isinstance(value, pa.Scalar):  # a time that Python's types cannot hold
        return value.cast(kind)
    if pa.types.is_string(kind) and isinstance(value, (dict, list, bool, int, float)):
        return json.dumps(value, ensure_ascii=False)
    if pa.types.is_string(kind):
        return str(value)
    if pa.types.is_floating(kind):
        return float(value)
    return value


def as_json(value: Any, kind: pa.DataType) -> Any:
    """Return a value for JSON, with the same type in all rows: loaders infer a column's type from few rows.

    Null, NaN and infinity become the empty value of the type; bytes are base64, times ISO 8601.
    """
    types = pa.types
    if types.is_struct(kind):
        return {field.name: as_json((value or {}).get(field.name), field.type) for field in kind}
    if types.is_list(kind):
        return [as_json(item, kind.value_type) for item in value or ()]
    if types.is_boolean(kind):
        return bool(value)
    if types.is_integer(kind):
        return value or 0
    if types.is_floating(kind):
        return float(value) if value is not None and math.isfinite(value) else 0.0
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, pa.Scalar):
        return value.cast(pa.string()).as_py().replace(" ", "T")
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, datetime.timedelta)):
        return str(value)
    return "" if value is None else value


def values_of(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return the values of a column; times that Python's types cannot hold stay Arrow scalars.

    Those are times in nanoseconds, or in the year 10000 and later. Raises: ValueError, OverflowError, ArrowException.
    """
    if pa.types.is_temporal(column.type) and getattr(column.type, "unit", "") == "ns":
        return [value if value.is_valid else None for value in column]
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError, pa.ArrowException):
        return [value_of(value) for value in column]


def value_of(value: pa.Scalar) -> Any:
    """Return an Arrow scalar as a Python value; a time that Python cannot hold is returned unchanged.

    Raises: ValueError, OverflowError, ArrowException for other values that Python cannot hold.
    """
    try:
        return value.as_py()
    except (ValueError, OverflowError, pa.ArrowException):
        if pa.types.is_temporal(value.type):
            return value
        raise


def passthrough_of(values: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """Return a row's passthrough columns, each in its type, in the order of the schema."""
    return {field.name: _as_arrow(values.get(field.name), field.type) for field in schema}


def feature(kind: pa.DataType) -> dict[str, Any]:
    """Return a portable type as a Hugging Face feature."""
    if pa.types.is_struct(kind):
        return {field.name: feature(field.type) for field in kind}
    if pa.types.is_list(kind):
        return {"_type": "List", "feature": feature(kind.value_type)}
    return {"_type": "Value", "dtype": _HF_NAMES.get(str(kind), str(kind))}
