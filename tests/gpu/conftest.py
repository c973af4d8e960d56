"""Tests on a CUDA device. What torch warns of there is shown and is no error, as in the rest of the suite: no machine
without a device could tell of it before, e.g. of TF32 when float32 is compiled, or of the watch for waits.
"""

from __future__ import annotations

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let a test go on after a warning."""
    item.add_marker(pytest.mark.filterwarnings("default"))
