"""Files that are published where the disk has no hard links, or none between two of its parts."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from flux_batch.errors import AlreadyExists
from flux_batch.storage.store import Store


def test_a_look_up_that_fails_does_not_make_a_name_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a bucket that is mounted by FUSE, whose server errs once."""
    store = Store(str(tmp_path))
    store.write("commit", b"first")
    real, failures = os.stat, iter([errno.EIO])

    def refuse(source: str, target: str) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def stat(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("commit") and (number := next(failures, None)):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(AlreadyExists):
        store.put_if_absent("commit", b"second")
    assert store.read("commit") == b"first"
