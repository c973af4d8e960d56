"""A Ray cluster of two nodes on this machine, started by `ray start`, with the job server of its dashboard.

Everything listens on free ports on loopback. Every process that it started ends with it, including drivers of jobs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from flux_batch.engine.ray_actor import WorkerActor
from helpers.s3 import free_port
from helpers.waiting import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S = 150.0
# The title that Ray gives to a process with a worker of a run.
WORKER = f"ray::{WorkerActor.__name__}".encode()
# A lost node counts as dead after 1.5 s instead of 15, but a slow node does not. No worker process is started in
# advance: the workers of a run are on other nodes, or have another environment.
SYSTEM = {
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 20_000,
    "health_check_failure_threshold": 3,
    "prestart_worker_first_driver": False,
}
# Ray puts sockets here, whose paths may have at most 107 characters.
TEMPORARY = Path(tempfile.gettempdir())


class JobServer:
    """A head and one more node, with a logical GPU each; `url` is the RAY_ADDRESS to submit jobs to."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
        self.environment = {
            **inherited,
            **environment,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._folder = folder
        self._log = (folder / "ray-start.log").open("wb")
        self._gcs = f"127.0.0.1:{free_port()}"
        self.url = f"http://127.0.0.1:{free_port()}"
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._num_started = 0
        self._known: dict[int, str] = {}  # all processes seen so far, and their start times

    def start(self) -> None:
        """Start both nodes."""
        options = ["--head", f"--port={self._gcs.rpartition(':')[2]}", f"--temp-dir={self._folder}", "--num-cpus=1"]
        options += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.url.rpartition(':')[2]}"]
        options += [f"--ray-client-server-port={free_port()}", f"--system-config={json.dumps(SYSTEM)}"]
        self._add(*options)
        self.add_node()

    def add_node(self) -> None:
        """Start a node, and wait until it has joined the cluster."""
        self._add(f"--address={self._gcs}", "--num-cpus=0")

    def kill_node(self) -> None:
        """Kill the raylet of the last node, like the loss of a machine; its workers notice by themselves."""
        self._look()
        node = self._nodes.pop()
        for pid in descendants(node.pid):
            if (Path("/proc") / str(pid) / "comm").read_text().strip() == "raylet":
                os.kill(pid, signal.SIGKILL)
        node.wait(timeout=START_S)  # `ray start --block` ends the rest of the node

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause all workers of runs during a block."""
        workers = [pid for node in self._nodes for pid in descendants(node.pid) if is_worker(pid)]
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in workers:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def log_of(self, name: str) -> str:
        """Read the log of a job's driver so far."""
        logs = self._folder.glob(f"session_*/logs/job-driver-{name}.log")
        return "".join(path.read_text() for path in logs if not path.parents[1].is_symlink())

    def run(
        self, *command: str, environment: Mapping[str, str] | None = None, timeout_s: float = PATIENCE_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command with the job server as its RAY_ADDRESS, as on the machine of a user who submits."""
        variables = {**self.environment, **(environment or {}), "RAY_ADDRESS": self.url}
        return subprocess.run(
            command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def end(self) -> None:
        """End every process of this cluster."""
        self._look()
        for node in self._nodes:
            node.kill()
            node.wait()
        wait_until(lambda: not self._kill_rest(), self._said, START_S)
        self._log.close()

    def _kill_rest(self) -> list[int]:
        """Kill the remaining processes: those seen before, and those that name the folder of this cluster."""
        left = {pid for pid, started in self._known.items() if started_at(pid) == started}
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and started_at(int(folder.name)):
                with suppress(OSError):
                    if f"{self._folder}/".encode() in (folder / "cmdline").read_bytes():
                        left.add(int(folder.name))
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return sorted(left)

    def _add(self, *options: str) -> None:
        command = [str(BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1", "--num-gpus=1", *options]
        command += [f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=100000000"]
        node = subprocess.Popen(
            command, env=self.environment, stdout=self._log, stderr=self._log, start_new_session=True
        )
        self._nodes.append(node)
        self._num_started += 1
        wait_until(lambda: self._num_seen() == self._num_started, self._said, START_S)

    def _num_seen(self) -> int:
        """Return the number of nodes that ever joined; a lost node may count as alive for a while."""
        if any(node.poll() is not None for node in self._nodes):
            raise AssertionError(f"a node ended: {self._said()}")
        with suppress(OSError, ValueError), urllib.request.urlopen(f"{self.url}/nodes?view=summary", timeout=5) as said:
            return len(json.load(said)["data"]["summary"])
        return 0

    def _look(self) -> None:
        """Record the running processes, so that they can be ended even after their parents."""
        for node in self._nodes:
            self._known |= {pid: started for pid in descendants(node.pid) if (started := started_at(pid))}

    def _said(self) -> str:
        return (self._folder / "ray-start.log").read_text()[-2000:]


@contextmanager
def job_server(environment: Mapping[str, str]) -> Iterator[JobServer]:
    """Run a cluster during a block."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir=TEMPORARY))
    server = JobServer(folder, environment)
    try:
        server.start()
        yield server
    finally:
        server.end()
        shutil.rmtree(folder, ignore_errors=True)


def descendants(pid: int) -> list[int]:
    """List the child processes of a process, recursively, without itself."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError, IndexError):
                parents.setdefault(int(stat(int(folder.name))[1]), []).append(int(folder.name))
    found = []
    waiting = [pid]
    while waiting:
        waiting += (children := parents.get(waiting.pop(), []))
        found += children
    return found


def is_worker(pid: int) -> bool:
    """Return whether a process holds a worker of a run."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(WORKER)
    except OSError:
        return False


def started_at(pid: int) -> str:
    """Return the start time of a process, empty if it has ended.

    It tells a process from a later one with the same id.
    """
    with suppress(OSError, IndexError):
        state = stat(pid)
        return "" if state[0] in "ZX" else state[19]
    return ""


def stat(pid: int) -> list[str]:
    """Return the fields of a process in proc_pid_stat(5) from the third on: state, parent, ..."""
    # The second field, the name of the program, may contain blanks and brackets.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
