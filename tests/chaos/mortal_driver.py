"""`flux-batch run` on the local engine that kills itself with SIGKILL at a point of the commit protocol.

The points lie around the writes of Store, which this module patches, since the product has no hook. A write is named by
the kind of its file and counted by name, since several threads write. On a disk, `within` is the moment between writing
a file and publishing it.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import helpers.no_sync  # noqa: F401
from chaos.paced_pipeline import PacedPipeline
from flux_batch import cli, job
from flux_batch.config.schema import ModelConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.output import lease
from flux_batch.storage.store import WRITES, Store
from helpers.driver import PRELOADED
from helpers.waiting import PATIENCE_S

NAMES = [
    (r"_run/tmp/.*", "probe"),
    (r"_run/lease/.*", "lease"),
    (r"_run/job\.yaml", "job"),
    (r"README\.md", "card"),
    (r"_run/plan\.parquet", "plan"),
    (r"_run/staging/.*/try-.*", "announcement"),
    (r"_run/staging/.*", "staging"),
    (r"train/.*/metadata.jsonl", "list of images"),
    (r"train/.*", "data"),
    (r"metadata/.*", "metadata"),
    (r"_run/failed/.*", "failed rows"),
    (r"_run/commits/.*", "commit"),
    (r"_run/commit_log\.parquet", "log of commits"),
    (r"_run/progress\.json", "progress"),
    (r"_run/report\.json", "report"),
    (r"_SUCCESS", "success"),
    (r"_run/precision\.json", "precision"),
    (r"_run/taken-back/.*", "note"),
]
PHASES = ("before", "within", "after")
# There is no second driver to wait for where writes are not conditional.
SETTLE_S = 0.1


@dataclass(frozen=True)
class Point:
    """The point before, within or after write number `number` of the kind `name`."""

    name: str
    number: int
    phase: str = "before"

    def __str__(self) -> str:
        return f"{self.phase} {self.name} {self.number}"


@dataclass(frozen=True)
class End:
    """The exit code and the output of a driver."""

    code: int
    said: str

    @property
    def is_killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Reaper:
    """Counts and logs the writes of this process, and kills the process at one of them."""

    def __init__(self, target: Point | None, log: Path) -> None:
        self._target = target
        self._log = log
        self._counts: Counter[str] = Counter()
        self._lock = threading.Condition()
        self._staged = 0
        self._here = threading.local()  # the current point of each thread

    def install(self) -> None:
        """Patch the writes of Store."""
        write, call, write_local = Store.write, Store._call, Store._write_local

        def write_and_say(store: Store, key: str, data: bytes | Path) -> None:
            self._here.data = data if isinstance(data, bytes) else b""
            write(store, key, data)

        def call_and_count(store: Store, key: str, operation: str, function: Callable[[], Any]) -> Any:
            if operation not in WRITES:
                return call(store, key, operation, function)
            name = self._name(key, operation)
            with self._lock:
                number = self._counts[name]
                self._counts[name] += 1
                with self._log.open("a") as log:
                    log.write(json.dumps([name, number]) + "\n")
            self._here.point = (name, number)
            self._reach("before")
            try:
                return call(store, key, operation, function)
            finally:  # also if the store refused the write, as it should for some
                self._here.point = (name, number)
                self._reach("after")
                with self._lock:
                    self._staged += name == "staging"
                    self._lock.notify_all()

        def write_and_publish(store: Store, key: str, data: bytes | Path, publish: Callable[[str, str], None]) -> None:
            def reach_and_publish(scratch: str, target: str) -> None:
                self._reach("within")
                publish(scratch, target)

            write_local(store, key, data, reach_and_publish)

        Store.write, Store._call, Store._write_local = write_and_say, call_and_count, write_and_publish  # type: ignore

    def wait_for_staged(self, count: int) -> None:
        """Wait until `count` batches are staged."""
        with self._lock:
            assert self._lock.wait_for(lambda: self._staged >= count, PATIENCE_S)

    def _name(self, key: str, operation: str) -> str:
        name = next((name for pattern, name in NAMES if re.fullmatch(pattern, key)), None)
        assert name, f"a write that has no name here: {operation} {key}"
        if operation == "delete":
            return {"staging": "clean-up", "announcement": "withdrawal"}.get(name, f"removal of {name}")
        if name == "lease" and operation == "write":
            if b'"is_released": true' in self._here.data:
                return "release"
            return name if b'"beats": 0' in self._here.data else "heartbeat"
        return name

    def _reach(self, phase: str) -> None:
        if self._target == Point(*self._here.point, phase):
            os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()  # block this thread until the signal arrives


class StagedPipeline(PacedPipeline):
    """A pipeline that is slower than any store, as a device is.

    It finishes no batch before the previous one is staged.
    """

    def __init__(self, folder: Path, reaper: Reaper) -> None:
        super().__init__(folder)
        self._reaper = reaper
        self._begun: list[set[str]] = []  # batches

    def __call__(self, prompt: Any, **others: Any) -> Any:
        if not (self._begun and self._begun[-1] >= set(prompt)):  # else it is a part of a batch that failed
            self._begun.append(set(prompt))
        self._reaper.wait_for_staged(len(self._begun) - 1)
        return super().__call__(prompt, **others)


def _drive(
    job_file: str, options: list[str], environment: Mapping[str, str], target: Point | None, log: str, said: str
) -> None:
    """Run the driver in this process, which is its own."""
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(environment)
    reaper = Reaper(target, Path(log))
    reaper.install()

    def make_pipeline(model: ModelConfig) -> StagedPipeline:
        return StagedPipeline(Path(model.uri), reaper)

    lease.SETTLE_S = SETTLE_S
    job.run = partial(job.run, engine=LocalEngine(), make_pipeline=make_pipeline)  # type: ignore[assignment]
    code = cli.main(["run", job_file, *options, "--debug"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Nursery:
    """Starts drivers as forks of one process that has already imported everything.

    Such a driver starts quickly and can really be killed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_drives = 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOADED, "chaos.mortal_driver"])

    def drive(
        self,
        job_file: Path,
        target: Point | None = None,
        *,
        options: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
        timeout_s: float = PATIENCE_S,
    ) -> End:
        """Run the driver until it ends or kills itself."""
        self._num_drives += 1  # each drive has its own log, since a driver might outlive its drive
        said = self._folder / f"said-{self._num_drives}.txt"
        variables = {**os.environ, **(environment or {})}
        arguments = (str(job_file), list(options), variables, target, str(self.log), str(said))
        process = self._context.Process(target=_drive, args=arguments)
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            assert process.pid
            os.kill(process.pid, signal.SIGABRT)  # makes faulthandler print the stack of each thread
            process.join()
            raise AssertionError(f"the driver did not end within {timeout_s} s: {said.read_text()}")
        end = End(process.exitcode, said.read_text())
        process.close()
        return end

    @property
    def log(self) -> Path:
        """The log of the last driver."""
        return self._folder / f"points-{self._num_drives}.jsonl"

    def points(self) -> list[tuple[str, int]]:
        """List the writes of the last driver, by name and number."""
        return [tuple(json.loads(line)) for line in self.log.read_text().splitlines()]  # type: ignore[misc]
