"""What Linux says of the processor."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def cpu_info(field: str) -> str:
    """Return a field of the first core, e.g. `vendor_id` or `model name`; "" if it is not said."""
    with suppress(OSError):
        for line in CPU_INFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""
