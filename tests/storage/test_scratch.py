import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
    folder.mkdir(parents=True)
    (folder / "image").write_bytes(b"x")
    age(folder.parent)
    assert sweep_scratch() == 1
    assert not folder.parent.exists()
    assert sweep_scratch() == 0


def test_a_folder_in_use_is_left_alone_however_old() -> None:
    with scratch_folder() as folder:
        age(folder.parent)
        assert sweep_scratch() == 0
        assert folder.exists()
    assert not folder.parent.exists()


def test_another_thread_may_finish_with_a_folder() -> None:
    held = ExitStack()
    folder = held.enter_context(scratch_folder())
    age(folder.parent)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(held.close).result()
    assert not folder.parent.exists()


def test_a_folder_of_a_process_that_is_killed_can_be_swept(home: Path) -> None:
    code = (
        f"import os, tempfile; tempfile.tempdir = {str(home)!r}\n"
        "from flux_batch.storage.scratch import scratch_folder\n"
        "with scratch_folder() as folder: print(folder, flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:  # type: ignore[call-overload]
        folder = Path(process.stdout.readline().strip())
        age(folder.parent)
        assert sweep_scratch() == 0
        process.kill()
        process.wait()
    age(folder.parent)
    assert sweep_scratch() == 1
    assert not folder.parent.exists()


def test_a_folder_that_was_only_just_made_is_left_alone() -> None:
    with scratch_folder() as folder:
        pass
    folder.mkdir(parents=True)
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
