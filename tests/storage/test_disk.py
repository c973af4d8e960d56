"""Writes to a disk without hard links, and into folders that another process removes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from flux_batch.errors import AlreadyExists, StoreRefused
from flux_batch.storage.store import Store


def test_a_look_up_that_fails_does_not_make_a_name_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This happens on a bucket mounted by FUSE, when its server fails once."""
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


def removed_as_they_are_made(monkeypatch: pytest.MonkeyPatch, folder: Path, times: int) -> None:
    """Remove a folder the first `times` it is made, as another process may do before this one uses it."""
    real, removals = os.mkdir, iter(range(times))

    def mkdir(path: Any, *args: Any, **options: Any) -> None:
        if os.fspath(path) == str(folder) and (number := next(removals, None)) is not None:
            raise FileExistsError(path) if number % 2 else FileNotFoundError(path)
        real(path, *args, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)


def test_a_folder_that_others_remove_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This happens if the next driver reverts the shard; the write must not fail or find its name taken."""
    store = Store(str(tmp_path))
    removed_as_they_are_made(monkeypatch, tmp_path / "train" / "00003", times=4)
    store.put_if_absent("train/00003/a.webp", b"image")
    assert store.read("train/00003/a.webp") == b"image"


def test_a_file_in_place_of_a_folder_is_no_object_that_is_taken(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (tmp_path / "train").write_text("a file")
    with pytest.raises(StoreRefused, match="Not a directory"):
        store.put_if_absent("train/00000.tar", b"images")
