"""Listings of a disk with links or with errors, such as those of NFS."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from flux_batch.errors import StoreRefused
from flux_batch.output.lease import Lease
from flux_batch.storage.store import Store


def failing_scandir(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int, times: int) -> None:
    """Make the next listings of a folder fail."""
    real, failures = os.scandir, iter(range(times))

    def scandir(path: Any = ".") -> Any:
        if os.fspath(path) == str(folder) and next(failures, None) is not None:
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_listing_that_fails_is_tried_again_and_never_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = Store(str(tmp_path))
    for key in ("a/x", "a/b/y"):
        store.write(key, b"")
    failing_scandir(monkeypatch, tmp_path / "a" / "b", number, times=2)
    assert store.list("a") == ["a/b/y", "a/x"]


def test_a_folder_that_must_not_be_read_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    store.write("a/x", b"")
    failing_scandir(monkeypatch, tmp_path / "a", errno.EACCES, times=9)
    with pytest.raises(StoreRefused, match="cannot list"):
        store.list("a")


def test_a_folder_that_is_removed_meanwhile_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    for key in ("a/x", "a/b/y"):
        store.write(key, b"")
    failing_scandir(monkeypatch, tmp_path / "a" / "b", errno.ENOENT, times=9)
    assert store.list("a") == ["a/x"]
    assert store.list("absent") == []


def test_a_link_to_a_folder_is_a_key_and_nothing_behind_it_is_one(tmp_path: Path) -> None:
    """`gc` and the removal of a folder delete the listed keys, so files behind links must not be listed."""
    store, others = Store(str(tmp_path / "out")), tmp_path / "others" / "x"
    others.parent.mkdir()
    others.write_bytes(b"")
    store.write("a/b/y", b"")
    links = tmp_path / "out" / "a"
    (links / "loop").symlink_to(".")
    (links / "b" / "others").symlink_to(others.parent)
    (links / "nowhere").symlink_to("absent")
    assert store.list("a") == ["a/b/others", "a/b/y", "a/loop", "a/nowhere"]
    store.delete_folder("a")
    assert others.exists()
    assert not links.exists()


def test_a_lease_is_not_lost_by_a_listing_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease(Store(str(tmp_path)), ttl_s=0.0)  # always expired, so that `check` reads the store
    lease.acquire()
    failing_scandir(monkeypatch, tmp_path / "_run" / "lease", errno.ESTALE, times=1)
    lease.check()
