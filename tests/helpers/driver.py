"""`flux-batch run` in a process of its own, to start, hold, pause, stop and kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from helpers.fakes import HOLD
from helpers.waiting import PATIENCE_S, wait_until

DRIVE = Path(__file__).with_name("drive.py")
STOPPING = "finishing or putting aside the current shards"


class Driver:
    """A driver with the fake pipeline, in a session of its own; killed where its `with` ends."""

    def __init__(self, job: Path, *options: str, engine: str = "local", **environment: str) -> None:
        file, self._said = tempfile.mkstemp(".stderr", dir=job.parent)
        with open(file, "ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(DRIVE), str(job), engine, *options],
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, **environment},
            )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()  # of one that has ended, nothing
        self.process.wait()

    @property
    def pid(self) -> int:
        """Give its process id."""
        return self.process.pid

    @property
    def said(self) -> str:
        """Give what it has written to stderr so far."""
        return Path(self._said).read_text()

    def send(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask it to stop, and wait until it has heard."""
        self.send(number)
        wait_until(lambda: STOPPING in self.said, lambda: self.said)

    def end(self, timeout: float = PATIENCE_S) -> tuple[int, str]:
        """Wait for the end. Returns: the exit code, and what was written to stderr."""
        code = self.process.wait(timeout)
        assert "Traceback" not in self.said
        return code, self.said


Drive: TypeAlias = Callable[..., Driver]


class Hold:
    """Keeps the images with `[hold]` in their prompt waiting, in every process with this environment."""

    def __init__(self, folder: Path) -> None:
        self.environment = {HOLD: str(folder)}
        self._folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "hold").touch()

    def wait_for(self, pid: int) -> None:
        """Wait until a process is in the middle of such an image."""
        wait_until(lambda: (self._folder / f"held-{pid}").exists())

    def release(self) -> None:
        """Let them be made."""
        (self._folder / "hold").unlink()


def first_to_end(drivers: Sequence[Driver]) -> tuple[Driver, Driver]:
    """Wait until one of two drivers ends. Returns: that one, and the other."""
    wait_until(lambda: any(driver.process.poll() is not None for driver in drivers))
    ended, other = sorted(drivers, key=lambda driver: driver.process.poll() is None)
    return ended, other


def commits(output: Path) -> list[str]:
    """List the commits of a run, by name."""
    return sorted(path.name for path in (output / "_run/commits").glob("*.json"))


def wait_for_commits(output: Path, count: int) -> None:
    """Wait until so many shards are committed."""
    wait_until(lambda: len(commits(output)) >= count)
