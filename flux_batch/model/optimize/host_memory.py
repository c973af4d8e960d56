"""The memory of this machine: the system's, or the cgroup's limit if that is lower."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

MEMORY_INFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def total_memory() -> int | None:
    """Return the total bytes of memory that this process can use; None if unknown."""
    total, limit = _of_system("MemTotal"), _of_cgroup("memory.max")
    return total if total is None or limit is None else min(total, limit)


def free_memory() -> int | None:
    """Return the bytes of memory that are still free for this process; None if unknown."""
    free, limit, used = _of_system("MemAvailable"), _of_cgroup("memory.max"), _of_cgroup("memory.current")
    return free if free is None or limit is None or used is None else min(free, max(0, limit - used))


def _of_system(name: str) -> int | None:
    with suppress(OSError, ValueError, StopIteration):
        line = next(line for line in MEMORY_INFO.read_text().splitlines() if line.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024
    return None


def _of_cgroup(name: str) -> int | None:
    """Return a number of the cgroup; None without a cgroup, or for "max", which means no limit."""
    with suppress(OSError, ValueError):
        return int((CGROUP / name).read_text())
    return None
