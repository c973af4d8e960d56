"""Programs that are not Python packages, for the tests that hold files against them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest


def tool(name: str, brought_by: str = "make tools") -> str:
    """Find a program beside this Python or on the path; without it skip the test, but in CI, where it must be, fail."""
    beside = str(Path(sys.executable).parent)
    if found := shutil.which(name, path=f"{beside}{os.pathsep}{os.environ['PATH']}"):
        return found
    missing = f"{name} is not installed; {brought_by} brings it"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)
