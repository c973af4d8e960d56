"""Types of keys that take values of several types, with an error message for others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator


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


def _prompt_uris(value: Any) -> tuple[str, ...]:
    uris = [value] if isinstance(value, str) else value
    if not isinstance(uris, (list, tuple)) or not all(isinstance(uri, str) for uri in uris):
        raise ValueError("must be a path or an address, or a list of them; quote numbers")
    return tuple(uris)


def _uris(value: Any) -> str | tuple[str, ...]:
    uris = [value] if isinstance(value, str) else value
    if not isinstance(uris, (list, tuple)) or not uris or not all(isinstance(uri, str) and uri for uri in uris):
        raise ValueError("must be a path or an address, or a list of them")
    return value if isinstance(value, str) else tuple(value)


def _scales(value: Any) -> float | tuple[float, ...]:
    scales = value if isinstance(value, (list, tuple)) else [value]
    if not all(type(scale) in (int, float) and math.isfinite(scale) for scale in scales):
        raise ValueError("must be a number, or a list of them")
    return tuple(map(float, scales)) if isinstance(value, (list, tuple)) else float(value)


def _wildcards(value: Any) -> bool | str:
    if not isinstance(value, (bool, str)):
        raise ValueError("must be true, false or a folder")
    return value


def _seed(value: Any) -> Any:
    """Return a text of digits as a number, since `{day}` is replaced by text."""
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) <= 20 else value


# Without this, pydantic warns when it writes a tuple of a union type as JSON.
_AS_LIST = PlainSerializer(lambda value: list(value) if isinstance(value, tuple) else value, when_used="json")
Seed = Annotated[int, BeforeValidator(_seed)]
Template = Annotated[str | dict[str, str] | None, PlainValidator(_template)]
PromptUris = Annotated[tuple[str, ...], BeforeValidator(_prompt_uris), Field(strict=False)]
Uris = Annotated[str | tuple[str, ...], PlainValidator(_uris, json_schema_input_type=str | list[str]), _AS_LIST]
Scales = Annotated[
    float | tuple[float, ...], PlainValidator(_scales, json_schema_input_type=float | list[float]), _AS_LIST
]
Wildcards = Annotated[bool | str, PlainValidator(_wildcards)]
BatchSize = Annotated[int | Literal["auto"], PlainValidator(_batch_size)]
