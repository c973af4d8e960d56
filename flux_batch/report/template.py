"""Templates of HTML pages, which lie beside the code that fills them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def load_template(folder: str, name: str, **filters: Callable[..., Any]) -> Template:
    """Load a template of a folder of this package. A name in it that does not exist is an error when it is filled in.

    Values are escaped; `filters` are its functions, by their names in it.
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
