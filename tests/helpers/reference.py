"""The API reference: `make docs` writes a page of each public module from its docstrings."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "flux_batch"
# Programs to run, not to import.
PROGRAMS = ("flux_batch.__main__", "flux_batch.demo.train", "flux_batch.demo.score")
# Show the list of modules first; otherwise pdoc begins with the package, which lists no modules.
_INDEX = '{% set root_module_name = false %}{% extends "default/index.html.jinja2" %}'


def public_modules() -> Iterator[str]:
    """Yield the names of all public modules."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not any(f"{name}.".startswith(f"{program}.") for program in PROGRAMS):
            yield name


def write_reference(folder: Path) -> None:
    """Write the pages into a folder."""
    import pdoc

    import flux_batch

    for name in flux_batch.__all__:  # loaded on first use
        setattr(flux_batch, name, getattr(flux_batch, name))
    top = sorted(name for name in public_modules() if name.count(".") == 1)
    with tempfile.TemporaryDirectory() as templates:
        Path(templates, "index.html.jinja2").write_text(_INDEX)
        pdoc.render.configure(docformat="markdown", template_directory=Path(templates))
        pdoc.pdoc("flux_batch", *top, *(f"!{program}" for program in PROGRAMS), output_directory=folder)


if __name__ == "__main__":
    write_reference(Path(sys.argv[1]))
