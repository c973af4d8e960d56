"""Memory that is freed and asked for again: of the system's pages, or of those that the process has kept."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Prints how many pages the system had to hand out for blocks that were all freed before.
PROGRAM = """
import resource, sys, threading
import numpy as np
from flux_batch.pipeline.heap import keep_freed_memory

def step():
    return [np.ones(1 << 19) for _ in range(6)]

def work():
    step()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(10):
        step()
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

if "keep" in sys.argv and not keep_freed_memory():
    print("no glibc")
elif "thread" in sys.argv:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
"""


def pages(*words: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True)
    if done.stdout.startswith("no glibc"):
        pytest.skip("no glibc here")
    return int(done.stdout)


@pytest.mark.parametrize("where", ["main", "thread"])
def test_what_was_freed_is_used_again(where: str) -> None:
    assert pages(where, "keep") < 100 < 20_000 < pages(where)
