"""Tests on a CUDA device, where warnings are shown but are not errors.

Only a device shows some of torch's warnings, e.g. of TF32 when float32 is compiled, so no test could allow them before.
"""

from __future__ import annotations

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test so that warnings do not fail it."""
    item.add_marker(pytest.mark.filterwarnings("default"))
