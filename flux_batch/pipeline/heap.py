"""What the C library does with memory that is freed: on a CPU, a worker has it kept for the next step.

By default glibc gives the larger blocks back to the system, which clears every page before it hands it out again: for
each step the same ones, a tenth of the time of an image. Values as in mallopt(3); 32 MB is the most it takes for a
block. A thread's heap is 64 MB; what does not fit there is still given back. To be called once the model is loaded, so
that what loading needed for a while is not kept.
"""

from __future__ import annotations

import ctypes
import sys

# malloc.h of glibc.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_KEPT_BLOCK = 32 << 20
LARGEST_KEPT_HEAP = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have this process keep blocks of up to 32 MB that it frees, 2 GB in all. Returns: False without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    kept = (M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK), (M_TRIM_THRESHOLD, LARGEST_KEPT_HEAP)
    return all(mallopt(name, value) for name, value in kept)
