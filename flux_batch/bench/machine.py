"""The machine of a measurement: hardware, versions, commit, command, date; and the peak of memory."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flux_batch.redaction import public_text
from flux_batch.report.summary import installed_versions

_PACKAGES = ("flux-batch", "torch", "transformers", "diffusers", "ray", "flash-attn", "flash-attn-3", "pillow", "numpy")


def describe_machine(argv: list[str] | None = None) -> dict[str, Any]:
    """Return hardware, versions, commit, date, and the command without secrets."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": public_text(shlex.join(["flux-batch", *(sys.argv[1:] if argv is None else argv)])),
        "hardware": {
            "gpu": gpu_name(),
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "versions": {**installed_versions(_PACKAGES), "cuda": _cuda_version()},
        "commit": commit_of(Path(__file__).parents[2]),
    }


def commit_of(checkout: Path) -> str | None:
    """Return the commit checked out in a folder, with + if files differ; None if it is not a checkout."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # git is missing, or does not trust the folder
        return None


def gpu_name(device: Any = None) -> str | None:
    """Return the name of a CUDA device, by default the first; None for another device, or without one."""
    import torch

    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    return str(torch.cuda.get_device_name(device))


def _cuda_version() -> str | None:
    """Return the version of CUDA that torch was built for."""
    import torch

    return torch.version.cuda


def _cpu_model() -> str:
    """Return the name of the processor."""
    from flux_batch.model.optimize.kernels import cpu_info

    return cpu_info("model name") or platform.processor() or platform.machine()


class PeakMemory:
    """The peak of memory since its creation, in bytes: of a CUDA device, else of this process's resident set.

    If the system cannot reset the peak of a process, it counts from the start of the process.
    """

    def __init__(self, device: Any) -> None:
        self.kind = "allocated on the device" if device.type == "cuda" else "resident set of the process"
        self._device = device
        if device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again from what is resident

    def bytes(self) -> int:
        """Return the peak so far."""
        if self._device.type == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated(self._device))
        with suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_bytes() -> int:
    """Return the bytes of this process in memory, as the system counts them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def measured(look: Callable[[], object]) -> dict[str, float]:
    """Return the seconds and CPU seconds of a function, and its peak of memory."""
    import pyarrow as pa
    import torch

    pa.default_memory_pool().release_unused()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory of earlier measurements to the system
    memory, base = PeakMemory(torch.device("cpu")), memory_bytes()
    started, started_cpu = time.perf_counter(), time.process_time()
    look()
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - started_cpu,
        "memory_bytes": memory.bytes() - base,
    }


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Run the block without the lines that a logger writes for each worker."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def synchronize(device: Any) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
