"""The errors of file systems, told as what to do about them."""

from __future__ import annotations

import pytest

from flux_batch.errors import StoreError
from flux_batch.storage.errors import is_transient, translated


@pytest.mark.parametrize("module", ["httpx", "httpx2._exceptions", "httpcore2", "aiohttp.client_exceptions"])
def test_a_hub_that_cannot_be_reached_is_away_and_nothing_unexpected(module: str) -> None:
    error = type("ConnectError", (Exception,), {"__module__": module})("Name or service not known")

    assert is_transient(error)
    said = "hf://x: cannot read: Name or service not known"
    with pytest.raises(StoreError, match=said) as raised, translated("hf://x", "read"):
        raise error
    assert raised.value.exit_code == 75
