"""A job file as text: YAML in, single settings over it, secrets out; knows no setting."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from flux_batch.errors import JobError
from flux_batch.records import ALIASES

REDACTED = "(redacted)"
# The storage options that carry no secret; every other value is redacted wherever a config is written down.
PUBLIC_OPTIONS = frozenset(
    {"anon", "client_kwargs", "endpoint_url", "profile", "region_name", "requester_pays", "use_ssl"}
)


def load_yaml(text: str, origin: str) -> Any:
    """Parse YAML; messages quote no line of it, since that may hold a secret."""
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise JobError(f"{origin}: {line}not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        # PyYAML lets through what Python says to `2026-13-01`, `!!int x` and the like.
        raise JobError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one value of a tree, as `section.key=value` says; the value is YAML too."""
    path, separator, value = override.partition("=")
    if not separator or not path.strip():
        raise JobError(f"--set {path}: must be section.key=value")
    *sections, key = path.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise JobError(f"--set {path}: {section} is not a section")
    tree[key] = load_yaml(value, f"--set {path}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the nearest known name, or list them all: the tail of an error message."""
    known = list(known)
    near = difflib.get_close_matches(name, [*known, *ALIASES], n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def redact(options: Mapping[str, Any]) -> dict[str, Any]:
    """Replace every value that may be a secret; addresses lose their user and password."""
    public: dict[str, Any] = {}
    for key, value in options.items():
        if key not in PUBLIC_OPTIONS:
            public[key] = REDACTED
        elif isinstance(value, Mapping):
            public[key] = redact(value)
        elif isinstance(value, str):
            public[key] = re.sub("//[^/]*@", "//", value)
        else:
            public[key] = value
    return public
