"""The text of a job file: YAML, overrides, the date of a scheduled run, and readable errors.

This module knows no setting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError

from flux_batch.errors import InvalidSetting, JobError, did_you_mean, one_line
from flux_batch.sampling_params import ALIASES

_MAX_MERGES = 100
# Without colons, which have a meaning in addresses and in the file names of some systems.
_DATE_FORMATS = {"{day}": "%Y%m%d", "{date}": "%Y-%m-%d", "{datetime}": "%Y-%m-%dT%H-%M-%S"}
_DATE = re.compile("|".join(map(re.escape, _DATE_FORMATS)))
# Any placeholder, also a misspelled one, in values that contain no other braces.
_PLACEHOLDER = re.compile(r"\{[^{}/]*\}")
# Pydantic's error types, and the words of our messages.
_KINDS = {
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    **dict.fromkeys(("tuple_type", "list_type"), "a list, in brackets"),
}
_LIMITS = {
    "greater_than_equal": "at least",
    "greater_than": "more than",
    "less_than_equal": "at most",
    "less_than": "less than",
}
_MERGE = "tag:yaml.org,2002:merge"
# The numbers of YAML 1.2's core schema, except that hexadecimal and octal numbers are texts.
_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's numbers; refuses duplicate keys and too many merges.

    YAML 1.1 reads 0123 as 83, 12:30:45 as 45045 and 1e-2 as a text.
    """

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Return the text of a scalar, with surrogate pairs of JSON escapes joined into characters."""
        text: str = super().construct_scalar(node)
        return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the next mapping. Raises: ConstructorError for a duplicate key; merged keys may be overridden."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in lines:
                    name = key.value if re.fullmatch(r"[\w.-]{1,60}", key.value) else "a key"
                    problem = f"{name} stands twice in one section, first on line {lines[key.value]}"
                    raise ConstructorError(None, None, problem, key.start_mark)
                lines[key.value] = key.start_mark.line + 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Resolve the merge keys of a mapping. Raises: ConstructorError for too many, or one that names no mapping.

        Each key is kept once, so that nested merges do not grow. Of two equal keys, PyYAML 6.0.4 keeps a different one
        than 6.0.3, so the choice is made here.
        """
        merges = [value for key, value in node.value if key.tag == _MERGE]
        node.value = [(key, value) for key, value in node.value if key.tag != _MERGE]
        # The first mapping of a sequence wins over later ones; the mapping's own keys win over all.
        sources = [each for value in merges for each in _merged(value)]
        if len(sources) > _MAX_MERGES:
            raise ConstructorError(None, None, "too many `<<` merges", node.start_mark)
        pairs: dict[object, tuple[yaml.Node, yaml.Node]] = {}
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                raise ConstructorError(None, None, "`<<` must name a mapping or several", source.start_mark)
            self.flatten_mapping(source)
            pairs |= {_identity(key): (key, value) for key, value in source.value}
        super().flatten_mapping(node)
        node.value = [*pairs.values(), *node.value]


def _merged(value: yaml.Node) -> list[yaml.Node]:
    """Return the nodes that a merge key names; the last one wins."""
    return list(reversed(value.value)) if isinstance(value, yaml.SequenceNode) else [value]


def _identity(key: yaml.Node) -> object:
    """Return a value that is the same for equal keys."""
    return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)


def load_yaml(text: str, origin: str) -> Any:
    """Return YAML as plain values. Raises: JobError, which does not quote the text: it may hold secrets."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = _unquoted(error.problem or "")
        is_layout = any(sign in problem for sign in ("<block", "mapping values", "token"))
        hint = "; compare the indentation, colons and quotes of this line with the one before" if is_layout else ""
        if "alphabetic or numeric character" in problem:  # expected by PyYAML after * or &
            hint = "; quote a text that begins with * or &"
        raise JobError(f"{origin}: {line}not valid YAML: {problem}{hint}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        # PyYAML passes on errors of Python for `2026-13-01`, `!!int x` and the like.
        raise JobError(f"{origin}: not valid YAML: {_unquoted(one_line(error))}") from None


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper; quotes texts that YAML 1.1 or 1.2 reads as numbers."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Dumper.yaml_implicit_resolvers = {
    first: resolvers + _Loader.yaml_implicit_resolvers[first]
    for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
}


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Return plain values as YAML, in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def overridden(overrides: Iterable[str]) -> tuple[str, ...]:
    """Return the dotted keys that overrides of the command line set."""
    return tuple(override.partition("=")[0].strip() for override in overrides)


def read_tree(text: str, origin: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Return a job file as a tree; `overrides` are `section.key=value` strings with YAML values. Raises: JobError."""
    tree = load_yaml(text, origin)
    if not isinstance(tree, dict):
        raise JobError(
            f"{origin}: is not a job file with the sections prompts, output and model; `flux-batch init` writes one"
        )
    for override in overrides:
        _apply_override(tree, override)
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one value of a tree, given as `section.key=value`."""
    path, value = _read_pair(override, "--set", "section.key=value", shown=re.split(r"[^\w.]", override.strip())[0])
    *sections, key = path.split(".")
    for section in sections:
        below = tree.get(section)
        if not isinstance(below, dict | None):
            raise JobError(f"--set {path}: {section} is not a section")
        tree[section] = dict(below or {})  # a copy: through a YAML alias, another section may be the same object
        tree = tree[section]
    tree[key] = value


def _read_pair(pair: str, option: str, form: str = "KEY=VALUE", *, shown: str = "") -> tuple[str, Any]:
    """Read a key and a YAML value from the argument of a command line option.

    Raises: JobError, which quotes only `shown` of a pair without a value, since the rest may be a secret.
    """
    key, separator, value = pair.partition("=")
    if not separator or not key.strip():
        raise JobError(f"{f'{option} {shown}'.strip()}: must be {form}")
    return key.strip(), load_yaml(value, f"{option} {key.strip()}")


def read_pairs(pairs: Iterable[str], option: str) -> dict[str, Any]:
    """Read all KEY=VALUE pairs of an option. Raises: JobError, see _read_pair."""
    return dict(_read_pair(pair, option) for pair in pairs)


def parse_moment(text: str) -> datetime:
    """Return a logical date, e.g. 2026-11-23, or with a time, 2026-11-23T02:00:00+00:00."""
    if not text.strip():
        raise JobError(
            "--logical-date is empty: the command that should print the day failed, as jobs/scheduled_date.py in $( ) "
            "does without a scheduled name; its own message is printed above"
        )
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise JobError(f"--logical-date {text!r}: must be a date, with a time or without, e.g. 2026-11-23") from None


def fill_in_dates(tree: dict[str, Any], moment: datetime | None, origin: str) -> dict[str, Any]:
    """Replace `{date}`, `{day}` and `{datetime}` in a tree by the logical date.

    It is never today's date: a retry after midnight must continue the run that it retries.
    Raises: JobError if a text has `{date}` and there is no logical date.
    """
    known: dict[int, Any] = {}  # with YAML aliases, a tree can be far larger than its text, or cyclic

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
            items.extend(filled(one, f"{path}.{index}") for index, one in enumerate(value))
            return items
        if not isinstance(value, str) or not _DATE.search(value):
            return value
        if moment is None:
            where = f"{origin}: {path.removeprefix('.')}"
            raise JobError(f"{where} needs the date of the run: set it with --logical-date, e.g. 2026-11-23")
        return _DATE.sub(lambda found: moment.strftime(_DATE_FORMATS[found[0]]), value)

    dated: dict[str, Any] = filled(tree, "")
    _check_placeholders(dated, origin)
    return dated


def _check_placeholders(tree: dict[str, Any], origin: str) -> None:
    """Raise JobError for an unknown placeholder in `name` or `output.uri`."""
    output = tree.get("output")
    values = {"name": tree.get("name"), "output.uri": output.get("uri") if isinstance(output, dict) else None}
    for key, value in values.items():
        if isinstance(value, str) and (found := _PLACEHOLDER.search(value)):
            near = did_you_mean(found[0].replace(" ", "").lower(), _DATE_FORMATS)
            hint = near or f"; there are {', '.join(_DATE_FORMATS)}"
            raise JobError(f"{origin}: {key}: {found[0]} is not a placeholder{hint}")


def nearest_or_all(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence that suggests the nearest name, or lists all names."""
    known = list(known)
    return did_you_mean(name, [*known, *ALIASES]) or f"; known are {', '.join(known)}"


def explain(error: ValidationError, model: type[BaseModel], origin: str, set_keys: Iterable[str] = ()) -> list[str]:
    """Return one line per pydantic error: dotted key, wrong value, what would be right.

    Each line begins with `origin`, or with `--set` if it is about one of `set_keys`.
    """
    lines = _lines_of(error, model)
    return [f"{'--set' if _is_of(line, set_keys) else f'{origin}:'} {line}" for line in lines]


def _is_of(line: str, keys: Iterable[str]) -> bool:
    key = line.split(":")[0].split(" ")[0]
    is_unknown = ": unknown key" in line  # perhaps the section of a key that was set
    for name in keys:
        section, dot, last = name.rpartition(".")
        ours = section + dot + ALIASES.get(last, last)
        if key in (name, ours) or key.startswith(f"{name}.") or (is_unknown and name.startswith(f"{key}.")):
            return True
    return False


def _lines_of(error: ValidationError, model: type[BaseModel]) -> list[str]:
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
            lines.append(f"{path}{_shown(finding)}: {_reason(finding)}")
    return lines


def _reason(finding: ErrorDetails) -> str:
    """Return what would be right, with the words of the table of keys."""
    kind, reason = finding["type"], finding["msg"].removeprefix("Value error, ")
    if kind in _KINDS:
        hint = "; quote a number or a date" if kind == "string_type" and finding["input"] is not None else ""
        return f"must be {_KINDS[kind]}{hint}"
    if kind == "literal_error":
        choices = finding["ctx"]["expected"]
        names = re.findall(r"\w+", choices)
        return f"must be {choices}{did_you_mean(str(finding['input']), names)}"
    if kind in _LIMITS:
        (limit,) = finding["ctx"].values()
        shown = limit if isinstance(limit, int) else f"{limit:g}"
        return f"must be {_LIMITS[kind]} {shown}"
    return reason[0].lower() + reason[1:]


def _shown(finding: ErrorDetails) -> str:
    """Return the wrong value for a message; empty if it may contain a secret."""
    value = finding["input"]
    if "storage_options" in finding["loc"] or not isinstance(value, (str, int, float)):
        return ""
    text = repr(value)
    return f" = {text}" if len(text) <= 100 else f" = {text[:100]}..."


def _keys_at(model: Any, sections: list[int | str]) -> list[str]:
    """Return the keys of the section at a path of keys and list indices."""
    for section in sections:
        is_item = isinstance(section, int)
        model = get_args(model)[0] if is_item else model.model_fields[section].annotation
        if not is_item and type(None) in get_args(model):
            model = get_args(model)[0]
    return list(model.model_fields)


def _unquoted(reason: str) -> str:
    """Return a reason without quoted texts, which may be secrets; quoted YAML punctuation stays."""
    return re.sub(r"(['\"])[^'\" ]{3,}\1", "...", " ".join(reason.split()))
