"""Types of keys that take values of several kinds, with a sentence for others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainValidator


def _batch_size(value: Any) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if type(value) is not int or value < 1:
        raise ValueError("must be a whole number of at least 1, or auto")
    return value


def _template(value: Any) -> str | dict[str, str] | None:
    if isinstance(value, Mapping) and all(isinstance(each, str) for pair in value.items() for each in pair):
        return dict(value)
    if value is not None and not isinstance(value, str):
        raise ValueError("must be a text, or a mapping of fields to texts: quote numbers")
    return value


def _wildcards(value: Any) -> bool | str:
    if not isinstance(value, (bool, str)):
        raise ValueError("must be true, false or a folder")
    return value


def _seed(value: Any) -> Any:
    """Return the number that a text of digits spells, as `{day}` leaves one."""
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) <= 20 else value


Seed = Annotated[int, BeforeValidator(_seed)]
Template = Annotated[str | dict[str, str] | None, PlainValidator(_template)]
Wildcards = Annotated[bool | str, PlainValidator(_wildcards)]
BatchSize = Annotated[int | Literal["auto"], PlainValidator(_batch_size)]
