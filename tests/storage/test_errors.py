"""Errors of disks, stores and hubs: transient ones, and those that a retry meets again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from flux_batch.errors import StoreError, StoreRefused
from flux_batch.storage.errors import is_transient, translated
from flux_batch.storage.retry import RetryPolicy
from flux_batch.storage.store import Store


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EFBIG, errno.EILSEQ, errno.EROFS])
def test_nobody_waits_for_a_disk_that_will_refuse_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """EXDEV is the error if `train` is a link to another disk."""
    store, calls = Store(str(tmp_path), policy=RetryPolicy(outage_s=1800)), []

    def refuse(source: str, target: str) -> None:
        calls.append(target)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreRefused, match=os.strerror(number)):
        store.put_if_absent("train/00000.tar", b"images")
    assert len(calls) == 1


@pytest.mark.parametrize(("code", "is_passing"), [("RequestTimeTooSkewed", True), ("SignatureDoesNotMatch", False)])
def test_a_request_that_was_signed_too_long_ago_is_signed_again(code: str, is_passing: bool) -> None:
    """This happens if a machine sleeps between signature and request; the next request has a new time."""
    answer = {"Error": {"Code": code, "Message": "403"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    assert is_transient(translate_boto_error(ClientError(answer, "PutObject"))) == is_passing


@pytest.mark.parametrize("module", ["httpx", "httpx2._exceptions", "httpcore2", "aiohttp.client_exceptions"])
def test_a_hub_that_cannot_be_reached_is_away_and_nothing_unexpected(module: str) -> None:
    error = type("ConnectError", (Exception,), {"__module__": module})("Name or service not known")

    assert is_transient(error)
    said = "hf://x: cannot read: Name or service not known"
    with pytest.raises(StoreError, match=said) as raised, translated("hf://x", "read"):
        raise error
    assert raised.value.exit_code == 75
