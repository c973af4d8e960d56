"""Builds the tables of keys in jobs/README.md from the texts, types and defaults of the config's fields.

python tests/helpers/job_file_table.py writes them into the page, as `make pages` does
"""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flux_batch.config.schema import JobConfig

PAGE = Path(__file__).parents[2] / "jobs/README.md"
START, END = "<!-- keys: `make pages` writes these tables -->\n", "<!-- end of keys -->\n"


def tables(config: type[BaseModel] = JobConfig) -> str:
    """Return a Markdown table for each section of the job file, and for the items of each list of sections."""
    return "\n".join(f"#### {title}\n\n{table(section, prefix)}" for title, prefix, section in _sections(config, ""))


def table(section: type[BaseModel], prefix: str) -> str:
    """Return the table of one section. Raises: ValueError for a field without a text."""
    texts = field_texts(section)
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if _section_of(field.annotation):
            continue
        if name not in texts:
            raise ValueError(f"{section.__name__}.{name} has no text below it that says what it is")
        cells = [f"`{prefix}{name}`", value_words(field), default_words(field), texts[name]]
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def field_texts(section: type[BaseModel]) -> dict[str, str]:
    """Return the text below each field of a class and of those it inherits from, by field name."""
    texts: dict[str, str] = {}
    for each in reversed(section.__mro__):
        if not each.__module__.startswith("flux_batch.") and each.__module__ != section.__module__:
            continue
        (definition,) = ast.parse(inspect.getsource(each)).body
        assert isinstance(definition, ast.ClassDef)
        for node, below in pairwise(definition.body):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and (text := _text(below)):
                texts[node.target.id] = text
    return texts


def value_words(field: FieldInfo) -> str:
    """Return the type and range of a field in words."""
    takes_one = any(isinstance(each, BeforeValidator) for each in field.metadata) and _words(field.annotation) == "list"
    return ("text or " if takes_one else "") + _words(field.annotation) + _range(field)


def default_words(field: FieldInfo) -> str:
    """Return the default as YAML writes it."""
    if field.default is PydanticUndefined:
        return "needed"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}`"


def _sections(config: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, type[BaseModel]]]:
    """Yield title, prefix of the keys and class of each table, in the order of the job file."""
    if any(not _section_of(field.annotation) for field in config.model_fields.values()):
        yield f"`{prefix.rstrip('.')}`" if prefix else "At the top", prefix, config
    for name, field in config.model_fields.items():
        if section := _section_of(field.annotation):
            yield from _sections(section, f"{prefix}{name}.")
        elif section := _section_of((*get_args(field.annotation), None)[0]):
            yield from _sections(section, f"{prefix}{name}[].")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if type(None) in get_args(annotation):  # a section that may be left out
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _text(node: ast.stmt) -> str:
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return " ".join(node.value.value.split()) if is_text else ""  # type: ignore[attr-defined]


def _words(annotation: Any) -> str:
    plain = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", type(None): "`null`"}
    if annotation in plain:
        return plain[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(each) for each in arguments)
    if origin in (dict, Mapping):
        return "mapping"
    if origin is tuple:
        return "list"
    raise ValueError(f"{annotation} has no words yet: add them here")


def _range(field: FieldInfo) -> str:
    words = []
    for bound in field.metadata:
        match bound:
            case annotated_types.Ge(ge=low):
                words.append(f"from {low}")
            case annotated_types.Gt(gt=low):
                words.append(f"more than {low}")
            case annotated_types.Le(le=high):
                words.append(f"to {high}")
            case annotated_types.Lt(lt=high):
                words.append(f"to 2^{int(high).bit_length() - 1} - 1" if high > 10**6 else f"less than {high}")
    return f", {' '.join(words)}" if words else ""


def write(page: Path = PAGE) -> None:
    """Replace the tables of the page."""
    before, _, rest = page.read_text().partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}\n{tables()}\n{END}{after}")


if __name__ == "__main__":
    write()
