"""A section of the job file: frozen, exact, without unknown keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

from flux_batch.redaction import public_tree


class Section(BaseModel):
    """A section of the job file: frozen, exact types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, public_tree(value, name or "")) for name, value in super().__repr_args__()]
