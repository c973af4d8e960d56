"""The base of the job file's sections: frozen, exact types, no unknown keys, no secrets in addresses."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from flux_batch.errors import InvalidSetting
from flux_batch.redaction import public_tree


class Section(BaseModel):
    """A section of the job file: frozen, exact types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _with_paths_as_text(cls, values: Any) -> Any:
        """Return the values with paths of pathlib as text, which a program may give."""
        return {name: _path_as_text(value) for name, value in values.items()} if isinstance(values, Mapping) else values

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, public_tree(value, name or "")) for name, value in super().__repr_args__()]


def _path_as_text(value: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)(map(_path_as_text, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def check_no_secret(uri: str, field: str, section: str) -> None:
    """Raise InvalidSetting for a URI with a user name or password."""
    if re.match("[^/]*://[^/]*@", uri):
        raise InvalidSetting(
            f"{field} holds a user name or password, which would be stored: use {section}.storage_options",
            field=field,
        )
