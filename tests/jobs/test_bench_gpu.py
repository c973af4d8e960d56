"""jobs/bench_gpu.sh with a fake program: the benchmarks that it runs, ends and summarizes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "jobs" / "bench_gpu.sh"
# A fake of Python: `kernels` ignores SIGTERM, like a hanging device; `plan` fails; all others print figures.
STAND_IN = """#!/usr/bin/env bash
if [ "$1" = -c ]; then exit 0; fi
echo "$*" >> "$CALLS"
case $4 in
    kernels) trap "" TERM; while :; do sleep 1; done ;;
    plan) echo "no rows" >&2; exit 2 ;;
    *) echo "whole call 1.5"; echo "of no interest" ;;
esac
"""

pytestmark = pytest.mark.skipif(not shutil.which("timeout"), reason="no timeout of coreutils")


def bench(folder: Path, **environment: str) -> tuple[str, list[str]]:
    """Run the script. Returns: its summary, and the benchmarks that it ran."""
    python, calls = folder / "python", folder / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    calls.touch()
    settings = {"PYTHON": str(python), "CALLS": str(calls), "COLD_S": "1", **environment}
    subprocess.run([SCRIPT, folder / "out"], env=os.environ | settings, check=True, capture_output=True, timeout=300)
    return (folder / "out" / "summary.txt").read_text(), calls.read_text().splitlines()


@pytest.mark.slow
def test_one_that_hangs_is_killed_and_one_that_fails_says_why_while_the_others_go_on(tmp_path: Path) -> None:
    summary, calls = bench(tmp_path, ONLY="kernels bf16-graphs plan job")

    assert "== kernels (at" in summary
    assert "ended after 1 s" in summary
    assert "failed with 2: no rows" in summary
    assert summary.count("whole call 1.5") == 2
    assert "of no interest" not in summary
    assert [call.split()[3] for call in calls] == ["kernels", "pipeline", "job", "plan"]
    assert "--option cuda_graphs=true" in calls[1]


def test_nothing_is_begun_that_may_take_longer_than_is_left(tmp_path: Path) -> None:
    summary, calls = bench(tmp_path, LIMIT_S="125", COLD_S="126")

    assert "== bf16: left out" in summary
    assert "== job: left out" in summary
    assert {call.split()[3] for call in calls} == {"pipeline", "load", "encode", "plan"}
    assert "--random-weights dev --device cuda" in calls[0]
