"""`flux-batch run` in its own process, which tests start, hold, pause, stop and kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import ClassVar, TypeAlias

from helpers import drive
from helpers.fakes import HOLD
from helpers.waiting import PATIENCE_S, wait_until

# The modules that a driver imports, some of them only when it runs.
PRELOADED = ["helpers.drive", "flux_batch.job", "flux_batch.worker.worker", "s3fs"]
STOPPING = "finishing or putting aside the current shards"


class Fork:
    """A driver forked from a process that has imported everything, with the interface of subprocess.Popen."""

    def __init__(self, program: ModuleType, words: Sequence[str], environment: Mapping[str, str], said: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._process = context.Process(
            target=drive.be_driver, args=(program.main, words, environment, os.getcwd(), said)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("a driver", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Driver:
    """A driver with the fake pipeline, in its own session, killed at the end of its `with` block.

    It is a fork of a process that has imported everything. With `is_child`, or on Ray, it is a child of this process,
    which reaps it only on `wait`.
    """

    program: ClassVar[ModuleType] = drive

    def __init__(
        self, job: Path, *options: str, engine: str = "local", is_child: bool = False, **environment: str
    ) -> None:
        file, self._said = tempfile.mkstemp(".stderr", dir=job.parent)
        words, variables = [str(job), engine, *options], {**os.environ, **environment}
        self.process: Fork | subprocess.Popen[bytes]
        with open(file, "ab") as stderr:
            if engine == "local" and not is_child:
                self.process = Fork(self.program, words, variables, self._said)
                return
            self.process = subprocess.Popen(
                [sys.executable, str(self.program.__file__), *words],
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=variables,
            )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()  # does nothing if it has ended
        self.process.wait()

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    @property
    def said(self) -> str:
        """The text that it has written to stderr so far."""
        return Path(self._said).read_text()

    def send(self, number: int) -> None:
        """Send a signal to the driver."""
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask the driver to stop, and wait until it has begun to."""
        self.send(number)
        wait_until(lambda: STOPPING in self.said, lambda: self.said)

    def end(self, timeout: float = PATIENCE_S) -> tuple[int, str]:
        """Wait for the end. Returns: the exit code and the text on stderr."""
        code = self.process.wait(timeout)
        assert "Traceback" not in self.said
        return code, self.said


Drive: TypeAlias = Callable[..., Driver]


class Hold:
    """Holds up images with `[hold]` in their prompt, in every process with this environment."""

    def __init__(self, folder: Path) -> None:
        self.environment = {HOLD: str(folder)}
        self._folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "hold").touch()

    def wait_for(self, pid: int) -> None:
        """Wait until a process is in the middle of a held image."""
        wait_until(lambda: (self._folder / f"held-{pid}").exists())

    def release(self) -> None:
        """Release all held images."""
        (self._folder / "hold").unlink()


def first_to_end(drivers: Sequence[Driver]) -> tuple[Driver, Driver]:
    """Wait until one of two drivers ends. Returns: the ended one, and the other."""
    wait_until(lambda: any(driver.process.poll() is not None for driver in drivers))
    ended, other = sorted(drivers, key=lambda driver: driver.process.poll() is None)
    return ended, other


def commits(output: Path) -> list[str]:
    """List the commits of a run, by name."""
    return sorted(path.name for path in (output / "_run/commits").glob("*.json"))


def wait_for_commits(output: Path, count: int) -> None:
    """Wait until `count` shards are committed."""
    wait_until(lambda: len(commits(output)) >= count)
