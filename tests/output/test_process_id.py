import os
import subprocess
import sys
from dataclasses import replace

import pytest

from flux_batch.output.process_id import ProcessId

OWN = "from flux_batch.output.process_id import ProcessId; p = ProcessId.own(); print(p.pid, p.started, flush=True)"


def test_a_living_process_is_not_gone() -> None:
    own = ProcessId.own()
    assert own.boot
    assert own.started
    assert str(own) == f"{own.host}:{os.getpid()}"
    assert not own.is_gone()


def test_a_process_that_ended_is_gone_even_before_its_parent_notices() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", OWN + "; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    pid, started = child.stdout.readline().split()
    process = replace(ProcessId.own(), pid=int(pid), started=started)
    assert not process.is_gone()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, but still in the process table
    assert process.is_gone()
    child.communicate()
    assert process.is_gone()


def test_a_number_that_is_used_again_is_another_process() -> None:
    assert replace(ProcessId.own(), started="1").is_gone()


@pytest.mark.parametrize("field", ["host", "boot", "namespace"])
def test_what_cannot_be_seen_from_here_is_not_called_gone(field: str) -> None:
    elsewhere = replace(ProcessId.own(), pid=2**22 + 1, started="1")
    assert elsewhere.is_gone()
    assert not replace(elsewhere, **{field: "another"}).is_gone()
    assert not replace(elsewhere, **{field: ""}).is_gone()


def test_the_first_process_of_the_machine_is_seen() -> None:
    assert replace(ProcessId.own(), pid=1, started="never").is_gone()
