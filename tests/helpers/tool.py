"""Finds programs that are not Python packages, for tests that check files with them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest


def tool(name: str, brought_by: str = "make tools") -> str:
    """Return the path of a program beside this Python or on PATH.

    Without it, skip the test, or fail in CI, where it must be installed.
    """
    beside = str(Path(sys.executable).parent)
    if found := shutil.which(name, path=f"{beside}{os.pathsep}{os.environ['PATH']}"):
        return found
    missing = f"{name} is not installed; {brought_by} brings it"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)
