"""The identity of a process, with which others can check that it has ended."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# States in /proc/PID/stat of a process that has ended, but was not reaped by its parent yet.
_ENDED_STATES = {"Z", "X", "x"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessId:
    """A unique identity of a process. Process ids are reused, so it includes the starts of process and machine.

    `boot`, `namespace` and `started` are empty on systems without /proc.
    """

    host: str
    boot: str
    namespace: str  # of process ids: containers of one machine may share everything else
    pid: int
    started: str

    @classmethod
    def own(cls) -> ProcessId:
        """Return the identity of this process."""
        return cls(
            host=socket.gethostname(),
            boot=_read("/proc/sys/kernel/random/boot_id"),
            namespace=_namespace(),
            pid=os.getpid(),
            started=_start_of(os.getpid()),
        )

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"

    def is_gone(self) -> bool:
        """Return whether the process has certainly ended; False if that cannot be seen from here."""
        here = ProcessId.own()
        if not (self.boot and self.namespace and self.started):
            return False
        if (self.host, self.boot, self.namespace) != (here.host, here.boot, here.namespace):
            return False
        started = _start_of(self.pid)
        # A process of another user may be hidden in /proc, but its id is still taken.
        return started != self.started if started else not _is_taken(self.pid)


def _start_of(pid: int) -> str:
    """Return the start of a process in clock ticks since the boot (proc_pid_stat(5), field 22); "" if it has ended."""
    # The second field is the name of the program, which may contain spaces and parentheses.
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in _ENDED_STATES else ""


def _is_taken(pid: int) -> bool:
    if _read(f"/proc/{pid}/stat"):
        return False  # it has ended, see _start_of
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _namespace() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
