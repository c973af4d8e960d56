"""`flux-batch run` in a process of its own, to start, pause, stop and kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

DRIVE = Path(__file__).with_name("drive.py")


class Driver:
    """A driver with the fake pipeline, on the local engine, in a session of its own."""

    def __init__(self, job: Path, *options: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVE), str(job), "local", *options],
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    @property
    def pid(self) -> int:
        """Give its process id."""
        return self.process.pid

    def send(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self, timeout: float = 60) -> tuple[int, str]:
        """Wait for the end. Returns: the exit code, and what was written to stderr."""
        _, err = self.process.communicate(timeout=timeout)
        assert "Traceback" not in err
        return self.process.returncode, err


def commits(output: Path) -> list[str]:
    """List the commits of a run, by name."""
    return sorted(path.name for path in (output / "_run/commits").glob("*.json"))


def wait_for_commits(output: Path, count: int) -> None:
    """Wait until so many shards are committed."""
    deadline = time.monotonic() + 60
    while len(commits(output)) < count:
        assert time.monotonic() < deadline, "no commits"
        time.sleep(0.02)
