"""The place of the cache, and its locks: one process at a time works in each part."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from flux_batch.download import local_copy
from flux_batch.download.local_copy import cache_folder, locked
from helpers.waiting import PATIENCE_S

HOLD = """
import sys
from pathlib import Path
from flux_batch.download.local_copy import locked
with locked(Path(sys.argv[1]), "tests"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_environment_names_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("FLUX_BATCH_CACHE", "~/x")
    assert cache_folder() == Path.home() / "x"
    monkeypatch.delenv("FLUX_BATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "flux-batch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/flux-batch"


@pytest.mark.parametrize("ending", ["leaves", "is killed"])
def test_a_lock_is_free_when_its_holder_ends(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local_copy, "WARN_AFTER_S", 0.1)
    caplog.set_level(logging.INFO, "flux_batch")
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == "held\n"

    def end(message: object) -> None:  # called once this process logs that it waits
        assert str(message) == "waiting for the process that builds a house"
        holder.kill() if ending == "is killed" else holder.stdin.close()  # type: ignore[union-attr]

    beats: list[str] = []
    monkeypatch.setattr(local_copy.LOADING, "beat", lambda: beats.append("alive"))
    monkeypatch.setattr(local_copy.log, "info", lambda text, *values: end(text % values))
    with locked(tmp_path / "lock", "builds a house"):
        pass
    assert beats, "who waits for another process would count as hung"
    holder.wait(timeout=PATIENCE_S)
    holder.stdout.close()
    holder.stdin.close()
