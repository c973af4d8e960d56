"""A job file as text: YAML in, single settings over it, the date of a scheduled run in it; knows no setting."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from flux_batch.errors import JobError, did_you_mean, one_line
from flux_batch.sampling_params import ALIASES

# A merge of merges doubles with every line, and a few lines would fill any memory.
MOST_MERGES, MOST_KEYS = 100, 10_000
# No colons: they mean something in addresses, and in the file names of some systems.
DATE_FORMATS = {"{date}": "%Y-%m-%d", "{datetime}": "%Y-%m-%dT%H-%M-%S"}
DATE = re.compile("|".join(map(re.escape, DATE_FORMATS)))
MERGE = "tag:yaml.org,2002:merge"


class Loader(yaml.SafeLoader):
    """The safe loader of PyYAML, with an end to merge keys."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Resolve the merge keys of a mapping. Raises: ConstructorError if they grow out of bounds."""
        merged = [value for key, value in node.value if key.tag == MERGE]
        num_merged = sum(len(value.value) if isinstance(value, yaml.SequenceNode) else 1 for value in merged)
        if num_merged <= MOST_MERGES:
            super().flatten_mapping(node)
        if num_merged > MOST_MERGES or (merged and len(node.value) > MOST_KEYS):
            raise ConstructorError(None, None, "too much is merged", node.start_mark)


def load_yaml(text: str, origin: str) -> Any:
    """Parse YAML. Messages quote nothing of it, nor does their traceback, since it may be a secret."""
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise JobError(f"{origin}: {line}not valid YAML: {_unquoted(error.problem or '')}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        # PyYAML lets through what Python says to `2026-13-01`, `!!int x` and the like.
        raise JobError(f"{origin}: not valid YAML: {_unquoted(one_line(error))}") from None


def read_tree(text: str, origin: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Parse a job file; `overrides` are `section.key=value` strings whose values are YAML too. Raises: JobError."""
    tree = load_yaml(text, origin)
    if not isinstance(tree, dict):
        raise JobError(f"{origin}: must be a mapping with the sections prompts, output and model")
    for override in overrides:
        apply_override(tree, override)
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one value of a tree, given as `section.key=value`."""
    path, value = read_pair(override, "--set", "section.key=value", shown=re.split(r"[^\w.]", override.strip())[0])
    *sections, key = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise JobError(f"--set {path}: {section} is not a section")
    tree[key] = value


def read_pair(pair: str, option: str, form: str = "KEY=VALUE", *, shown: str = "") -> tuple[str, Any]:
    """Read a key and a value, which is YAML, from what follows `option` on the command line.

    Raises: JobError that quotes only `shown` of a pair without a value, since the rest may be a secret.
    """
    key, separator, value = pair.partition("=")
    if not separator or not key.strip():
        raise JobError(f"{f'{option} {shown}'.strip()}: must be {form}")
    return key.strip(), load_yaml(value, f"{option} {key.strip()}")


def read_pairs(pairs: Iterable[str], option: str) -> dict[str, Any]:
    """Read all KEY=VALUE pairs of an option. Raises: JobError, see read_pair."""
    return dict(read_pair(pair, option) for pair in pairs)


def parse_moment(text: str) -> datetime:
    """Read a logical date: 2026-11-23, or with a time as schedulers write it, 2026-11-23T02:00:00+00:00."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise JobError(f"--logical-date {text!r}: must be a date, as 2026-11-23, or also a time, in ISO 8601") from None


def fill_in_dates(tree: dict[str, Any], moment: datetime | None, origin: str) -> dict[str, Any]:
    """Put a run's logical date in the place of `{date}` and `{datetime}` in every text of a tree.

    Never the date of today: a retry after midnight must go on with the run that it retries.
    Raises: JobError if a text asks for a date and there is none.
    """
    known: dict[int, Any] = {}  # a tree of aliases is far larger than its text, or without an end

    def filled(value: Any, path: str) -> Any:
        if id(value) in known:
            return known[id(value)]
        if isinstance(value, dict):
            branch = known[id(value)] = {}
            branch.update({key: filled(one, f"{path}.{key}") for key, one in value.items()})
            return branch
        if isinstance(value, list):
            items: list[Any] = []
            known[id(value)] = items
            items.extend(filled(one, f"{path}.{place}") for place, one in enumerate(value))
            return items
        if not isinstance(value, str) or not DATE.search(value):
            return value
        if moment is None:
            where = f"{origin}: {path.removeprefix('.')}"
            raise JobError(f"{where} asks for the date of the run: say which with --logical-date, e.g. 2026-11-23")
        return DATE.sub(lambda found: moment.strftime(DATE_FORMATS[found[0]]), value)

    dated: dict[str, Any] = filled(tree, "")
    return dated


def nearest_or_all(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence that suggests the nearest known name, or lists them all."""
    known = list(known)
    return did_you_mean(name, [*known, *ALIASES]) or f"; known are {', '.join(known)}"


def _unquoted(reason: str) -> str:
    """Return a reason without what it quotes, which may be a secret, but for signs of YAML themselves."""
    return re.sub(r"(['\"])[^'\" ]{3,}\1", "...", " ".join(reason.split()))
