"""The file system of an address: one that cannot be opened is an error of one sentence."""

from __future__ import annotations

from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from flux_batch.errors import StoreError, StoreRefused
from flux_batch.storage.store import Store
from helpers.s3 import KEY, SECRET, assert_clear


@pytest.mark.parametrize(
    ("uri", "options", "words"),
    [
        ("s5://bucket/run", {}, "s5"),
        ("s3://bucket/run", {"endpoint_url": "localhost:9000"}, "Invalid endpoint: localhost:9000"),
        ("s3://bucket/run", {"endpoint": "http://localhost:9000"}, "'endpoint'"),
        ("s3://bucket/run", {"client_kwargs": {"bogus": 1}}, "'bogus'"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(uri: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(StoreRefused, match=words) as caught:
        Store(uri, {"key": KEY, "secret": SECRET, **options} if uri.startswith("s3:") else options)

    assert_clear(caught.value, uri)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError("no libjvm\ndlopen(/usr/lib)\ndlopen(/lib)"), StoreRefused, "cannot be opened: no libjvm"),
        (ConnectionRefusedError(111, "refused"), StoreError, "cannot connect: [Errno 111] refused"),
        (TimeoutError(), StoreError, "cannot connect: TimeoutError"),
    ],
)
def test_a_client_that_cannot_connect_says_so_in_one_line(
    error: OSError, kind: type[StoreError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(self: MemoryFileSystem, **options: Any) -> None:
        raise error

    monkeypatch.setattr(MemoryFileSystem, "connect", connect, raising=False)
    with pytest.raises(StoreError) as caught:
        Store("memory://run")
    assert type(caught.value) is kind
    assert str(caught.value) == f"memory://run: {words}"
