import re
import subprocess
import sys
from pathlib import Path

import flux_batch


def test_every_public_name_can_be_imported() -> None:
    assert flux_batch.__all__ == sorted(flux_batch.__all__)
    for name in flux_batch.__all__:
        assert getattr(flux_batch, name).__name__ == name


def test_every_public_name_is_on_a_page() -> None:
    root = Path(__file__).parents[1]
    text = "\n".join(
        page.read_text() for page in [root / "README.md", *root.glob("jobs/*.md"), *root.glob("flux_batch/*/*.md")]
    )
    assert [name for name in flux_batch.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(flux_batch, "FluxVideoPipeline")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, flux_batch; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'pyarrow', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
