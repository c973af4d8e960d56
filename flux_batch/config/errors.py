"""What pydantic found wrong with a tree of settings, in our words; knows no setting."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from flux_batch.config.text import nearest_or_all
from flux_batch.errors import InvalidSetting


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return a line of each finding: dotted key, what was got, what would be right."""
    lines = []
    for finding in error.errors():
        path = ".".join(str(part) for part in finding["loc"])
        cause = finding.get("ctx", {}).get("error")
        if finding["type"] == "extra_forbidden":
            *sections, key = finding["loc"]
            lines.append(f"{path}: unknown key{nearest_or_all(str(key), _keys_at(model, sections))}")
        elif finding["type"] == "missing":
            lines.append(f"{path}: missing, and it has no default")
        elif isinstance(cause, InvalidSetting):
            lines.append(f"{path}.{cause}" if path else str(cause))
        elif finding["type"] in ("model_type", "dict_type"):
            lines.append(f"{path}: must be a section with keys and values")
        else:
            reason = finding["msg"].removeprefix("Value error, ")
            reason = reason[0].lower() + reason[1:]
            lines.append(f"{path}{_shown(finding)}: {reason}")
    return lines


def _shown(finding: ErrorDetails) -> str:
    """Show the value that was wrong, unless it is, or holds, what may be a secret."""
    value = finding["input"]
    if "storage_options" in finding["loc"] or not isinstance(value, (str, int, float)):
        return ""
    text = repr(value)
    return f" = {text}" if len(text) <= 100 else f" = {text[:100]}..."


def _keys_at(model: Any, sections: list[int | str]) -> list[str]:
    for section in sections:
        is_item = isinstance(section, int)
        model = get_args(model)[0] if is_item else model.model_fields[section].annotation
    return list(model.model_fields)
