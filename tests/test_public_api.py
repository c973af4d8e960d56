import subprocess
import sys

import flux_batch


def test_every_public_name_can_be_imported() -> None:
    assert flux_batch.__all__ == sorted(flux_batch.__all__)
    for name in flux_batch.__all__:
        assert getattr(flux_batch, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(flux_batch, "FluxVideoPipeline")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, flux_batch; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'pyarrow', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
