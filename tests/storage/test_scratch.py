import errno
import os
import time
from pathlib import Path

import pytest

from flux_batch.errors import DiskFull, StoreError, StoreRefused
from flux_batch.storage.scratch import YOUNG_S, scratch_folder, sweep_scratch


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def age(folder: Path) -> None:
    then = time.time() - 2 * YOUNG_S
    os.utime(folder, (then, then))


def test_a_folder_is_empty_and_gone_after_use() -> None:
    with scratch_folder() as folder:
        assert list(folder.iterdir()) == []
        (folder / "image").write_bytes(b"x")
    assert not folder.exists()


def test_what_a_killed_worker_left_is_swept() -> None:
    with scratch_folder() as folder:
        pass
    folder.mkdir()
    (folder / "image").write_bytes(b"x")
    age(folder)
    assert sweep_scratch() == 1
    assert not folder.exists()
    assert sweep_scratch() == 0


def test_a_folder_in_use_is_left_alone_however_old() -> None:
    with scratch_folder() as folder:
        age(folder)
        assert sweep_scratch() == 0
        assert folder.exists()


def test_a_folder_that_was_only_just_made_is_left_alone() -> None:
    with scratch_folder() as folder:
        pass
    folder.mkdir()
    assert sweep_scratch() == 0
    assert folder.exists()


def test_a_full_disk_is_named(home: Path) -> None:
    with pytest.raises(DiskFull, match=rf"{home}.*: no room for the files of a shard .*TMPDIR"), scratch_folder():
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StoreError, match=r"^bucket$"), scratch_folder():
        raise StoreError("bucket")
    with pytest.raises(OSError, match="Input/output"), scratch_folder():
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("trap", ["link", "file", "owner"])
def test_a_name_that_somebody_else_took_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch, trap: str) -> None:
    place = home / f"flux-batch-{os.getuid()}"
    (home / "theirs").mkdir()
    if trap == "link":
        place.symlink_to(home / "theirs")
    elif trap == "file":
        place.write_bytes(b"")
    else:
        place.mkdir()
        uid = os.getuid()
        monkeypatch.setattr(os, "getuid", iter([uid, uid + 1]).__next__)
    with pytest.raises(StoreRefused, match=r"flux-batch-\d+: is not a folder of this user"), scratch_folder():
        pass
    assert list((home / "theirs").iterdir()) == []
