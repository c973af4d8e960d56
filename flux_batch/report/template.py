"""Loading of HTML templates, which lie beside the code that fills them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def load_template(folder: str, name: str, **filters: Callable[..., Any]) -> Template:
    """Load a template from a folder of this package. Filling it raises an error for an unknown name.

    Values are escaped. filters: functions for the template, by name.
    """
    environment = Environment(
        loader=PackageLoader(__package__, folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(name)
